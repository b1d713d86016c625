use super::*;

fn config() -> VmConfig {
    VmConfig { accel: AccelChoice::Soft, ..VmConfig::default() }
}

#[test]
fn impossible_configurations_are_refused_one_by_one() {
    let bad = [
        VmConfig { cpus: 0, ..config() },
        VmConfig { cpus: 256, ..config() },
        VmConfig { cpu_affinity: vec![vec![0]; 2], ..config() },
        VmConfig { memory: MemoryConfig { size: 1 << 20, ..MemoryConfig::default() }, ..config() },
    ];
    for config in bad {
        assert!(matches!(Vm::builder(config).build(), Err(VmError::Config(_))));
    }
    assert!(matches!(Vm::builder(config()).build(), Err(VmError::Boot(_))), "no kernel");
    // No host CPU in the set that remains.
    let unbound = VmConfig { cpu_affinity: vec![vec![usize::MAX]], ..config() };
    assert!(matches!(Vm::builder(unbound).build(), Err(VmError::Affinity { vcpu: 0, .. })));
}

#[test]
fn configuration_round_trips_and_unknown_fields_are_errors() {
    let text = r#"{"cpus": 2, "memory": {"size": 134217728}, "accel": "soft",
        "boot": {"kernel": "vmlinuz", "command_line": "quiet"}, "console": {"file": "log"}}"#;
    let config: VmConfig = serde_json::from_str(text).unwrap();
    assert_eq!(config.console, ConsoleConfig::File("log".into()));
    let again = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
    assert_eq!(config, again);
    assert!(serde_json::from_str::<VmConfig>(r#"{"cpu": 2}"#).is_err());
}
