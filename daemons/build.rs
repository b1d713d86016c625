//! Link options of the programs.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let is = |name, value| std::env::var(name).as_deref() == Ok(value);
    if is("CARGO_CFG_TARGET_OS", "linux") {
        // A tenth of the relocations' size: each start reads all of them.
        println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
        if is("CARGO_CFG_TARGET_ENV", "gnu") {
            // The unwinder within the program: one library less to find, map and relocate at each start.
            println!("cargo:rustc-link-lib=static:-bundle=gcc_eh");
        }
    }
}
