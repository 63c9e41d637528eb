//! The name under which the loader finds the library: it changes with the major version of the ABI, so that programs built
//! against another do not start.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/context.rs");
    let source = std::fs::read_to_string("src/context.rs").expect("the package is whole");
    let (_, rest) = source.split_once("PIXMIM_ABI_MAJOR: u32 = ").expect("the version is there");
    let (major, _) = rest.split_once(';').expect("the version is a number");
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libpixmim.so.{major}");
    }
}
