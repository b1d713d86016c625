//! The C interface used from C: the examples and the hostile caller, by gcc with all warnings as errors, linked with
//! the shared and with the static library; the header as C++.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn crate_dir() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where cargo put `libnacre.so` and `libnacre.a`: beside this test.
fn library_dir() -> PathBuf {
    std::env::current_exe().unwrap().parent().unwrap().to_owned()
}

fn run(command: &mut Command) -> Output {
    let program = command.get_program().to_owned();
    let output =
        command.output().unwrap_or_else(|e| panic!("{}: {e}; install the Debian package", program.display()));
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    output
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Link {
    Shared,
    Static,
}

/// Compiles a C program and returns the executable.
fn compile(source: &Path, link: Link, out: &Path) -> PathBuf {
    let name = format!("{}-{link:?}", source.file_stem().unwrap().display());
    let exe = out.join(name);
    let lib = library_dir();
    let mut gcc = Command::new("gcc");
    gcc.args(["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O1", "-g", "-o"])
        .arg(&exe)
        .arg(source)
        .arg("-I")
        .arg(crate_dir().join("include"));
    match link {
        Link::Shared => {
            gcc.arg(lib.join("libnacre.so")).arg(format!("-Wl,-rpath,{}", lib.display())).arg("-lpthread")
        }
        Link::Static => {
            gcc.arg(lib.join("libnacre.a")).args(["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl"])
        }
    };
    run(&mut gcc);
    exe
}

/// valgrind that fails at the first invalid access or definite leak.
fn valgrind() -> Command {
    let mut valgrind = Command::new("valgrind");
    valgrind.args([
        "--error-exitcode=9",
        "--leak-check=full",
        "--show-leak-kinds=definite",
        "--errors-for-leak-kinds=definite",
        "-q",
    ]);
    valgrind
}

#[test]
fn hostile_callers_get_errors() {
    let source = crate_dir().join("tests/c/hostile.c");
    for link in [Link::Shared, Link::Static] {
        let dir = tempfile::tempdir().unwrap();
        let exe = compile(&source, link, dir.path());
        let output = run(Command::new(exe).arg(dir.path()));
        assert_eq!(String::from_utf8_lossy(&output.stdout), "hostile: ok\n");
    }
}

#[test]
fn hostile_callers_are_clean_under_valgrind() {
    let dir = tempfile::tempdir().unwrap();
    let exe = compile(&crate_dir().join("tests/c/hostile.c"), Link::Shared, dir.path());
    run(valgrind().arg(exe).arg(dir.path()));
}

#[test]
fn header_compiles_as_cxx() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("header.cc");
    std::fs::write(&source, "#include <nacre.h>\nint main() { return nacre_error_depth(nullptr) != 0; }\n")
        .unwrap();
    run(Command::new("g++")
        .args(["-std=c++17", "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only", "-I"])
        .arg(crate_dir().join("include"))
        .arg(&source));
}

#[test]
fn example_disk_chain() {
    let source = crate_dir().join("../examples/c/disk_chain.c");
    for link in [Link::Shared, Link::Static] {
        let dir = tempfile::tempdir().unwrap();
        let exe = compile(&source, link, dir.path());
        let output = run(Command::new(exe).arg(dir.path()));
        assert_eq!(String::from_utf8_lossy(&output.stdout), "1048576 bytes\nfrom the base\nfrom the child\n");
    }
}

#[test]
fn example_disk_jobs() {
    let source = crate_dir().join("../examples/c/disk_jobs.c");
    for link in [Link::Shared, Link::Static] {
        let dir = tempfile::tempdir().unwrap();
        let exe = compile(&source, link, dir.path());
        let output = run(Command::new(exe).arg(dir.path()));
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(text, "2 layers\n1 layer\nbefore\nafter!\nmoving\n");
    }
}

#[test]
fn example_disk_lease() {
    let dir = tempfile::tempdir().unwrap();
    let exe = compile(&crate_dir().join("../examples/c/disk_lease.c"), Link::Shared, dir.path());
    let (leases, image) = (dir.path().join("leases"), dir.path().join("disk.qcow2"));
    let host = |number: &str| {
        let mut command = Command::new(&exe);
        command.arg(&leases).arg(&image).arg(number);
        command
    };
    run(&mut host("0"));
    let first = run(&mut host("1"));
    assert!(String::from_utf8_lossy(&first.stdout).starts_with("host 1 reads '' under token "), "{first:?}");
    let second = run(&mut host("2"));
    let text = String::from_utf8_lossy(&second.stdout);
    assert!(text.starts_with("host 2 reads 'written by host-1' under token "), "{text}");
}

/// Python without any binding.
#[test]
fn example_python() {
    let dir = tempfile::tempdir().unwrap();
    let guest = tiny_guest(dir.path());
    let output = run(Command::new("python3")
        .arg(crate_dir().join("../examples/python/nacre_tour.py"))
        .arg(library_dir().join("libnacre.so"))
        .arg(&guest)
        .arg(dir.path()));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.starts_with("disk: from python\nerror: "), "{text}");
    assert!(text.contains("none.qcow2") && text.ends_with("console: hello\nreason: 1\n"), "{text}");
}

#[test]
fn example_accelerators() {
    let dir = tempfile::tempdir().unwrap();
    let exe = compile(&crate_dir().join("../examples/c/accelerators.c"), Link::Shared, dir.path());
    let output = run(&mut Command::new(exe));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("kvm ") && text.contains("soft "), "{text}");
    assert_eq!(text.matches(" chosen ").count(), 1, "{text}");
}

/// A guest that says hello and switches itself off.
fn tiny_guest(dir: &Path) -> PathBuf {
    let guest = dir.join("guest.elf");
    run(Command::new("gcc")
        .args(["-nostdlib", "-static", "-no-pie", "-Wl,-Ttext=0x200000", "-Wl,--build-id=none", "-o"])
        .arg(&guest)
        .arg(crate_dir().join("tests/c/guest.S")));
    guest
}

#[test]
fn example_boot() {
    let dir = tempfile::tempdir().unwrap();
    let guest = tiny_guest(dir.path());
    for link in [Link::Shared, Link::Static] {
        let exe = compile(&crate_dir().join("../examples/c/boot.c"), link, dir.path());
        let output = run(Command::new(&exe).arg(&guest));
        assert_eq!(String::from_utf8_lossy(&output.stdout), "hello\n");
        let missing = Command::new(&exe).arg(dir.path().join("missing")).output().unwrap();
        assert!(!missing.status.success());
        assert!(String::from_utf8_lossy(&missing.stderr).contains("missing"), "{missing:?}");
    }
}

#[test]
fn hostile_callers_of_jobs_and_leases_get_errors() {
    let dir = tempfile::tempdir().unwrap();
    let exe = compile(&crate_dir().join("tests/c/hostile_jobs.c"), Link::Shared, dir.path());
    let output = run(Command::new(&exe).arg(dir.path()));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "hostile: ok\n");
    let dir = tempfile::tempdir().unwrap();
    run(valgrind().arg(exe).arg(dir.path()));
}

#[test]
fn hostile_callers_of_machines_get_errors() {
    let dir = tempfile::tempdir().unwrap();
    let guest = tiny_guest(dir.path());
    let exe = compile(&crate_dir().join("tests/c/hostile_vm.c"), Link::Shared, dir.path());
    let output = run(Command::new(&exe).arg(&guest));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "hostile: ok\n");
    run(valgrind().arg(exe).arg(guest));
}
