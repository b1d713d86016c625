//! The committed header is what the code says, and the exported symbols are what the header declares.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::path::Path;
use std::process::Command;

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

/// The structures of the header with their fields, in order.
fn structures(header: &str) -> Vec<(&str, Vec<&str>)> {
    let mut found: Vec<(&str, Vec<&str>)> = Vec::new();
    let mut inside = false;
    for line in header.lines() {
        if let Some(name) = line.strip_prefix("struct ").and_then(|rest| rest.strip_suffix(" {")) {
            found.push((name, Vec::new()));
            inside = true;
        } else if line.starts_with('}') {
            inside = false;
        } else if inside && let Some(field) = line.trim().strip_suffix(';') {
            let field = field.split('[').next().unwrap();
            let name = field.rsplit(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).next().unwrap();
            found.last_mut().unwrap().1.push(name);
        }
    }
    found
}

#[test]
fn layouts_of_structures_change_only_on_purpose() {
    let header = generate();
    let structures = structures(&header);
    assert!(
        structures.iter().any(|(name, fields)| *name == "nacre_vm_options" && fields.contains(&"memory"))
    );
    let mut program =
        String::from("#include <nacre.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {\n");
    for (name, fields) in &structures {
        program += &format!("printf(\"%s %zu\\n\", \"{name}\", sizeof(struct {name}));\n");
        for field in fields {
            let member = format!("((struct {name} *)0)->{field}");
            program += &format!(
                "printf(\"    %zu+%zu %s\\n\", offsetof(struct {name}, {field}), sizeof({member}), \"{field}\");\n"
            );
        }
    }
    program += "return 0; }\n";
    let dir = tempfile::tempdir().unwrap();
    let (source, exe) = (dir.path().join("layout.c"), dir.path().join("layout"));
    std::fs::write(&source, program).unwrap();
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("include");
    let compiled = Command::new("gcc").arg("-I").arg(include).arg("-o").arg(&exe).arg(&source).status();
    assert!(compiled.expect("gcc is missing; install the Debian package gcc").success());
    check("abi/layout.txt", &String::from_utf8(Command::new(exe).output().unwrap().stdout).unwrap());
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
