//! Compiles Triton's configuration schema, and bakes in where the native libraries were at build time, so that the
//! binary runs without any variable set.

use std::env;
use std::error::Error;
use std::fs;
use std::path::Path;

const TRITON_SCHEMA: &str = "src/export/model_config.proto";

/// Process groups of LibTorch's c10d behind a C interface.
const RANKS: &str = "src/torch/ranks";

/// Functions of LibTorch that `tch` does not offer, behind a C interface.
const NATIVE: &str = "src/torch/native";

fn compile_native(include: &Path) {
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .define("USE_C10D_GLOO", None)
        .define("USE_DISTRIBUTED", None)
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .include(include)
        .include(include.join("torch/csrc/api/include"))
        .include(RANKS)
        .file(format!("{RANKS}/c10d.cpp"))
        .file(format!("{NATIVE}/memory.cpp"))
        .file(format!("{NATIVE}/onednn.cpp"))
        .compile("interlace_c10d");
}

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed={TRITON_SCHEMA}");
    println!("cargo:rerun-if-changed={RANKS}");
    println!("cargo:rerun-if-changed={NATIVE}");
    if let Ok(libtorch) = env::var("LIBTORCH") {
        compile_native(&Path::new(&libtorch).join("include"));
    }
    let mut compiler = protox::Compiler::new(["src/export"])?;
    compiler.open_file(TRITON_SCHEMA)?;
    let out = env::var("OUT_DIR")?;
    fs::write(Path::new(&out).join("model_config.bin"), compiler.encode_file_descriptor_set())?;
    prost_build::compile_fds(compiler.file_descriptor_set())?;
    // A package has the libraries in `lib/` beside `bin/`, and no path of the machine that made it.
    println!("cargo:rerun-if-env-changed=INTERLACE_RELOCATABLE");
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/../lib");
    let relocatable = env::var_os("INTERLACE_RELOCATABLE").is_some();
    if let (Ok(libtorch), false) = (env::var("LIBTORCH"), relocatable) {
        let lib = Path::new(&libtorch).join("lib");
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    }
    // Code of LibTorch's wrapper that the library could call back would keep it linked: `interlace` offers none.
    println!("cargo:rustc-link-arg-bin=interlace=-Wl,--exclude-libs=ALL");
    if let (Ok(library), false) = (env::var("ORT_DYLIB_PATH"), relocatable) {
        println!("cargo:rustc-env=INTERLACE_ORT_DYLIB_PATH={library}");
    }
    Ok(())
}
