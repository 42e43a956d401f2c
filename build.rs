//! Bakes in where the native libraries were at build time, so that the binary runs without any variable set.

use std::env;
use std::path::Path;

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-env-changed=ORT_DYLIB_PATH");
    if let Ok(libtorch) = env::var("LIBTORCH") {
        let lib = Path::new(&libtorch).join("lib");
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    }
    if let Ok(library) = env::var("ORT_DYLIB_PATH") {
        println!("cargo:rustc-env=INTERLACE_ORT_DYLIB_PATH={library}");
    }
}
