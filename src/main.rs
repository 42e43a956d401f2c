//! The `interlace` command. It passes the verbs that compute in LibTorch on to `interlace-torch`.

fn main() {
    interlace::cli::main(interlace::cli::hand_over)
}
