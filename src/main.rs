//! The `interlace` command: every verb but those that compute in LibTorch, which it hands over to
//! `interlace-torch`.

fn main() {
    interlace::cli::main(interlace::cli::hand_over)
}
