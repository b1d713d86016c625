//! The committed header is what the code says, and the exported symbols are what the header declares.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::path::Path;

fn generate() -> String {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(dir.join("cbindgen.toml")).unwrap();
    let bindings = cbindgen::Builder::new().with_crate(dir).with_config(config).generate().unwrap();
    let mut header = Vec::new();
    bindings.write(&mut header);
    String::from_utf8(header).unwrap()
}

/// Compares a generated text with the committed one; `NACRE_BLESS=1` commits the new one.
fn check(file: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    if std::env::var_os("NACRE_BLESS").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == text,
        "{file} is stale; if the change is meant, run: NACRE_BLESS=1 cargo test -p bindings-c --test header"
    );
}

#[test]
fn header_is_current() {
    check("include/nacre.h", &generate());
}

#[test]
fn exported_symbols_change_only_on_purpose() {
    let header = generate();
    let mut names: Vec<&str> = header
        .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .zip(header.split_inclusive(|c: char| !(c.is_ascii_alphanumeric() || c == '_')))
        .filter(|(name, with)| name.starts_with("nacre_") && with.ends_with('('))
        .map(|(name, _)| name)
        .collect();
    names.sort_unstable();
    names.dedup();
    assert!(names.contains(&"nacre_error_free"));
    check("abi/symbols.txt", &(names.join("\n") + "\n"));
    let script =
        format!("NACRE_0 {{\n    global:\n        {};\n    local: *;\n}};\n", names.join(";\n        "));
    check("abi/nacre.map", &script);
}
