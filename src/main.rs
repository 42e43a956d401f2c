//! The `interlace` command.

fn main() {
    println!("interlace {}", env!("CARGO_PKG_VERSION"));
}
