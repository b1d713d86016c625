//! Link options of the programs.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // A tenth of the relocations' size: each start reads all of them.
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
}
