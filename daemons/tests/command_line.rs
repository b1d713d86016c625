//! What all programs do alike with a wrong command line and with an error: one line, and the exit status says which.
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::process::{Command, Stdio};

const PROGRAMS: [(&str, &str); 4] = [
    ("nacre", env!("CARGO_BIN_EXE_nacre")),
    ("nacre-blk", env!("CARGO_BIN_EXE_nacre-blk")),
    ("nacre-node", env!("CARGO_BIN_EXE_nacre-node")),
    ("nacre-switch", env!("CARGO_BIN_EXE_nacre-switch")),
];

/// Longest lines of help, in characters.
const LONGEST: usize = 100;

/// Exit status and standard error.
fn fail(program: &str, arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(program).args(arguments).env("RUST_BACKTRACE", "1").output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_wrong_command_line_is_one_line_and_exit_status_2() {
    for (name, program) in PROGRAMS {
        let (status, text) = fail(program, &["--no-such-option"]);
        assert_eq!(status, Some(2), "{name}: {text}");
        assert_eq!(text.lines().count(), 1, "{name}: {text}");
        assert!(text.starts_with(&format!("{name}: ")) && text.contains("--no-such-option"), "{text}");
    }
}

/// As with `nacre schema | head -1`, and on a full disk.
#[test]
fn output_that_nobody_takes_ends_a_program_in_good_order() {
    let nacre = |output: Stdio| {
        let output = Command::new(PROGRAMS[0].1).arg("schema").stdout(output).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    assert_eq!(nacre(writer.into()), (Some(141), String::new()));
    let (status, text) = nacre(std::fs::File::options().write(true).open("/dev/full").unwrap().into());
    assert_eq!(status, Some(1));
    assert!(text.starts_with("Cannot write to standard output") && text.lines().count() == 1, "{text}");
}

#[test]
fn an_error_is_one_line_and_exit_status_1() {
    let missing = "no/such/file";
    let arguments: [&[&str]; 4] = [
        &["run", "--kernel", missing],
        &["--export", "name=d,path=no/such/file,format=raw", "--unix", "unused"],
        &["--config", missing],
        &["--config", missing],
    ];
    for ((name, program), arguments) in PROGRAMS.into_iter().zip(arguments) {
        let (status, text) = fail(program, arguments);
        assert_eq!(status, Some(1), "{name}: {text}");
        assert_eq!(text.lines().count(), 1, "{name}: {text}");
        assert!(text.starts_with(&format!("{name}: ")) && text.contains(missing), "{text}");
    }
}

#[test]
fn a_lockspace_at_an_offset_that_no_file_has_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let volume = dir.path().join("volume");
    for offset in [u64::MAX, u64::MAX - (1 << 20)] {
        let offset = offset.to_string();
        let (status, text) = fail(
            env!("CARGO_BIN_EXE_nacre"),
            &["cluster", "format", volume.to_str().unwrap(), "--space", "s", "--offset", &offset],
        );
        assert_eq!(status, Some(1), "{text}");
        assert!(text.contains("The offset is too large"), "{text}");
    }
    assert_eq!(std::fs::metadata(&volume).unwrap().len(), 0);
}

/// The names below "Commands:" in a help.
fn commands(help: &str) -> Vec<&str> {
    let list = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let names = list.take_while(|line| !line.is_empty()).filter(|line| !line.starts_with("    "));
    names.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help").collect()
}

/// Checks the help of a command and of all below it; returns how many these are.
fn check_help(program: &str, path: &[&str]) -> usize {
    let mut arguments = if path.is_empty() { vec!["--help"] } else { vec!["help"] };
    arguments.extend(path);
    // A terminal wider than lines may be.
    let output = Command::new(program).args(&arguments).env("COLUMNS", "400").output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{program} {arguments:?}");
    let help = String::from_utf8(output.stdout).unwrap();
    let longest = help.lines().map(|line| line.chars().count()).max();
    assert!(longest <= Some(LONGEST), "{program} {arguments:?} has a line of {longest:?} characters: {help}");
    // What the parser had to wrap is indented as its beginning, and cannot be copied any more.
    let examples = help.lines().skip_while(|line| !line.starts_with("Example")).skip(1);
    let mut lines = examples.take_while(|line| !line.is_empty()).filter_map(|line| line.strip_prefix("  "));
    let cut =
        lines.find(|line| !["nacre", "echo", "nbdinfo", "  "].iter().any(|start| line.starts_with(start)));
    assert_eq!(cut, None, "{program} {arguments:?} has an example that is too long: {help}");
    let below = commands(&help);
    assert!(
        !below.is_empty() || help.contains("\nExample"),
        "{program} {arguments:?} has no example: {help}"
    );
    1 + below.iter().map(|name| check_help(program, &[path, &[name]].concat())).sum::<usize>()
}

#[test]
fn every_command_explains_itself_with_examples() {
    let counts = PROGRAMS.map(|(_, program)| check_help(program, &[]));
    assert!(counts[0] > 40 && counts[3] > 5, "commands are missing from the help: {counts:?}");
}
