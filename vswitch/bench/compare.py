#!/usr/bin/env python3
"""Compare nacre-switch with Open vSwitch (DPDK datapath) under the same load, and print ratios.

One DPDK testpmd owns two virtio-user ports on one core and bounces frames between them through the switch under
test, which has another core. Every frame that testpmd receives it sends back, so frames circulate and none are lost;
the rate is what the switch sustains. With one frame in flight a port, the rate gives the one-way latency.

Needs root, two cores, and the Debian packages dpdk-dev (testpmd) and openvswitch-switch-dpdk. Both sides run at the
highest priority, in turns; the ratio is the median of the rounds. Other load on the machine spoils the figures: runs
in which either side had less than 95 % of its core are repeated, and marked if that does not help.

The rate also depends on how long a cache line takes from one core to the other. A virtual machine's host may move its
cores apart and together again at any time; the figures of both switches then jump between two levels, and a ratio
across the jump says nothing. `--verbose` shows the rounds.

    cargo build --release -p daemons --bin nacre-switch
    vswitch/bench/compare.py target/release/nacre-switch
"""
import argparse, contextlib, json, os, pathlib, re, shutil, signal, subprocess, sys, tempfile, time

HUGE_PAGES = 512
TICK = os.sysconf("SC_CLK_TCK")
OVS_SWITCHD = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk"
BRIDGE = "nacre-compare"
OVS_SCHEMA = "/usr/share/openvswitch/vswitch.ovsschema"

# name, frame size, frames in flight a port (0: as many as go), flows, policy
CASES = [
    ("learning, 64 B", 64, 512, 1, "learning"),
    ("learning, 1518 B", 1518, 512, 1, "learning"),
    ("learning, latency", 64, 1, 1, "learning"),
    ("UDP rule, 64k flows", 64, 0, 65536, "udp"),
    ("conntrack", 64, 512, 2, "conntrack"),
    # With packed rings.
    ("learning, 64 B, packed", 64, 512, 1, "learning"),
]


def need(program, package):
    if not (shutil.which(program) or os.path.exists(program)):
        sys.exit(f"{program} is missing: install the Debian package {package}")


def favour(pid):
    """Puts a process before the machine's other load: at once, and as a group where the kernel schedules groups."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.setpriority(os.PRIO_PROCESS, int(thread), -20)
    group = pathlib.Path(f"/proc/{pid}/autogroup")
    if group.exists():
        group.write_text("-20")


def cpu_seconds(pid, thread):
    fields = pathlib.Path(f"/proc/{pid}/task/{thread}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def busiest_thread(pid):
    before = {t: cpu_seconds(pid, t) for t in os.listdir(f"/proc/{pid}/task")}
    time.sleep(0.3)
    return max(before, key=lambda t: cpu_seconds(pid, t) - before[t])


@contextlib.contextmanager
def huge_pages(directory):
    setting = pathlib.Path("/proc/sys/vm/nr_hugepages")
    old = setting.read_text()
    if int(old) < HUGE_PAGES:
        setting.write_text(str(HUGE_PAGES))
    directory.mkdir()
    subprocess.run(["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "none", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", directory])
        setting.write_text(old)


def stop(process):
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(path, process=None):
    for _ in range(300):
        if os.path.exists(path):
            return
        if process and process.poll() is not None:
            break
        time.sleep(0.1)
    sys.exit(f"{path} did not appear")


def set_rules(bridge, env):
    """The same rules for both switches."""
    subprocess.run(["ovs-ofctl", "del-flows", bridge], env=env, check=True)
    for a, b in ((1, 2), (2, 1)):
        subprocess.run(["ovs-ofctl", "add-flow", bridge, f"in_port={a},udp,actions=output:{b}"], env=env, check=True)


@contextlib.contextmanager
def nacre(binary, work, core, policy):
    """nacre-switch with two vhost-user ports; yields its process number and the sockets."""
    sockets = [work / "n0", work / "n1"]
    port = {"security_groups": ["any"]} if policy == "conntrack" else {}
    rules = [{"direction": d, "protocol": "udp"} for d in ("ingress", "egress")]
    config = {
        "port_groups": {"g": port},
        "security_groups": {"any": {"rules": rules}},
        "ports": {s.name: {"kind": {"vhost_user": {"socket": str(s), "packed_rings": True}}, "group": "g", "number": i + 1}
                  for i, s in enumerate(sockets)},
    }
    file = work / "nacre.json"
    file.write_text(json.dumps(config))
    with open(work / "nacre.log", "w") as log:
        p = subprocess.Popen([binary, "--config", file, "--cores", str(core), "--openflow", f"punix:{work}/of"], stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(sockets[1], p)
        if policy == "udp":
            wait_for(work / "of", p)
            set_rules(f"unix:{work}/of", dict(os.environ, OVS_RUNDIR=str(work)))
        yield p.pid, sockets
    finally:
        stop(p)


@contextlib.contextmanager
def open_vswitch(work, *settings):
    """An Open vSwitch of our own with an empty bridge in its userspace datapath; yields its process number, directory
    and environment, and how to call its tools."""
    run = work / "ovs"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    env = dict(os.environ, OVS_RUNDIR=run, OVS_LOGDIR=run, OVS_DBDIR=run, OVS_SYSCONFDIR=run)
    env = {k: str(v) for k, v in env.items()}
    db = f"unix:{run}/db.sock"

    def call(*args):
        subprocess.run([str(a) for a in args], env=env, check=True, stdout=subprocess.DEVNULL)

    call("ovsdb-tool", "create", run / "conf.db", OVS_SCHEMA)
    log = open(work / "ovs.log", "w")
    server = subprocess.Popen(["ovsdb-server", f"{run}/conf.db", f"--remote=punix:{run}/db.sock"], env=env, stdout=log, stderr=log)
    switchd = None
    try:
        wait_for(run / "db.sock", server)
        vsctl = ("ovs-vsctl", f"--db={db}", "--no-wait")
        call(*vsctl, "init")
        call(*vsctl, "set", "Open_vSwitch", ".", *settings)
        switchd = subprocess.Popen([OVS_SWITCHD, db], env=env, stdout=log, stderr=log, start_new_session=True)
        vsctl = ("ovs-vsctl", f"--db={db}", "--timeout=60")
        call(*vsctl, "add-br", BRIDGE, "--", "set", "bridge", BRIDGE, "datapath_type=netdev")
        yield switchd, run, env, lambda *args: call(*(vsctl if args[0] != "ovs-ofctl" else ()), *args)
    finally:
        for p in filter(None, (switchd, server)):
            stop(p)
        log.close()
        # Open vSwitch leaves its interfaces behind.
        for link in ("ovs-netdev", BRIDGE):
            subprocess.run(["ip", "link", "del", link], stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def ovs(work, huge, core, other, policy):
    """Open vSwitch with two vhost-user server ports."""
    settings = ("other_config:dpdk-init=true", "other_config:dpdk-socket-mem=256",
                f"other_config:dpdk-lcore-mask={1 << other:#x}", f"other_config:pmd-cpu-mask={1 << core:#x}",
                f"other_config:dpdk-extra=--no-pci --file-prefix=nacre-ovs --huge-dir={huge}")
    with open_vswitch(work, *settings) as (switchd, run, env, call):
        for i in (0, 1):
            call("add-port", BRIDGE, f"vu{i}", "--", "set", "Interface", f"vu{i}", "type=dpdkvhostuser",
                 f"ofport_request={i + 1}")
        flows = {
            "learning": ["actions=NORMAL"],
            "udp": [],
            "conntrack": ["priority=0,actions=drop", "table=0,priority=10,udp,actions=ct(table=1)",
                          "table=1,priority=10,udp,ct_state=+trk+new,actions=ct(commit),NORMAL",
                          "table=1,priority=10,udp,ct_state=+trk+est,actions=NORMAL"],
        }[policy]
        call("ovs-ofctl", "del-flows", BRIDGE)
        for f in flows:
            call("ovs-ofctl", "add-flow", BRIDGE, f)
        if policy == "udp":
            set_rules(BRIDGE, env)
        wait_for(run / "vu1", switchd)
        yield switchd.pid, [run / "vu0", run / "vu1"]


class Testpmd:
    """Drives one testpmd through its prompt."""

    def __init__(self, work, huge, sockets, core, main, size, in_flight, flows, packed):
        self.log = work / "testpmd.log"
        out = open(self.log, "w")
        burst = 1 if in_flight == 1 else 32
        self.start = f"start tx_first {in_flight // burst}" if in_flight else "start"
        mode = ["--forward-mode=mac"] if in_flight else ["--forward-mode=flowgen", f"--flowgen-flows={flows}"]
        devices = [f"--vdev=net_virtio_user{i},mac=02:00:00:00:00:0{i},path={s},queues=1,queue_size=1024"
                   + (",packed_vq=1" if packed else "")
                   for i, s in enumerate(sockets)]
        peers = [f"--eth-peer={i},02:00:00:00:00:0{1 - i}" for i in (0, 1)]
        command = ["stdbuf", "-oL", "dpdk-testpmd", "-l", f"{main},{core}", f"--main-lcore={main}", "-n", "1", "--no-pci",
                   "--no-telemetry", "--single-file-segments", "--file-prefix=nacre-bench", f"--huge-dir={huge}", "-m", "256",
                   *devices, "--log-level=pmd.net.virtio.init:info", "--", "-i", "--nb-cores=1", *peers, "--txd=1024", "--rxd=1024", "--total-num-mbufs=16384",
                   *mode, f"--burst={burst}", f"--txpkts={size - 4}"]
        if flows > 1 and in_flight:
            command.append("--txonly-multi-flow")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out, text=True,
                                        start_new_session=True)
        try:
            self.expect("testpmd>", 1)
            if ("using packed ring" in self.text()) != packed:
                sys.exit("the switch does not offer the rings to measure:\n" + self.text()[-2000:])
        except SystemExit:
            stop(self.process)
            raise

    def text(self):
        return self.log.read_text(errors="replace")

    def expect(self, what, count):
        for _ in range(1200):
            if self.text().count(what) >= count:
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        sys.exit("testpmd failed:\n" + self.text()[-2000:])

    def say(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def received(self):
        n = self.text().count("RX-packets")
        self.say("show port stats all")
        self.expect("RX-packets", n + 2)
        return time.monotonic(), sum(int(v) for v in re.findall(r"RX-packets: (\d+)", self.text())[-2:])


def measure(work, huge, switch, args, case):
    """Returns frames a second, and whether both sides had their cores to themselves."""
    name, size, in_flight, flows, _ = case
    pid, sockets = switch
    pmd = Testpmd(work, huge, sockets, args.client_core, args.switch_core, size, in_flight, flows, packed="packed" in name)
    try:
        favour(pid)
        favour(pmd.process.pid)
        # A switch may still be setting its ports up and drop the first frames, after which none would circulate.
        for _ in range(6):
            pmd.say(pmd.start)
            time.sleep(1)
            (_, before), _ = pmd.received(), time.sleep(0.3)
            if pmd.received()[1] > before:
                break
            pmd.say("stop")
            time.sleep(0.5)
        else:
            sys.exit("no frames pass through the switch")
        threads = [(pid, busiest_thread(pid)), (pmd.process.pid, busiest_thread(pmd.process.pid))]
        best = (0, 0)
        for _ in range(args.retries):
            cpu = [cpu_seconds(*t) for t in threads]
            t0, r0 = pmd.received()
            time.sleep(args.seconds)
            t1, r1 = pmd.received()
            shares = [(cpu_seconds(*t) - c) / (t1 - t0) for t, c in zip(threads, cpu)]
            best = max(best, (min(shares), (r1 - r0) / (t1 - t0)))
            if best[0] >= 0.95:
                break
        return best[1], best[0] >= 0.95
    finally:
        pmd.say("quit")
        stop(pmd.process)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", help="nacre-switch, built with --release")
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs a case")
    parser.add_argument("--verbose", action="store_true", help="print every round")
    parser.add_argument("--retries", type=int, default=4, help="measurements of a run until one is not disturbed")
    parser.add_argument("--client-core", type=int, default=0)
    parser.add_argument("--switch-core", type=int, default=1)
    parser.add_argument("--only", help="run only cases whose name contains this")
    args = parser.parse_args()
    # Ended from outside, it cleans up all the same.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    need("dpdk-testpmd", "dpdk-dev")
    need(OVS_SWITCHD, "openvswitch-switch-dpdk")
    work = pathlib.Path(tempfile.mkdtemp(prefix="nacre-bench-"))
    huge = work / "huge"
    try:
        with huge_pages(huge):
            print(f"{'case':24} {'nacre':>10} {'ovs-dpdk':>10} {'ratio':>6}")
            for case in CASES:
                if args.only and args.only not in case[0]:
                    continue
                rounds, quiet = [], True
                for _ in range(args.rounds):
                    with nacre(args.binary, work, args.switch_core, case[4]) as switch:
                        ours, quiet_a = measure(work, huge, switch, args, case)
                    with ovs(work, huge, args.switch_core, args.client_core, case[4]) as switch:
                        theirs, quiet_b = measure(work, huge, switch, args, case)
                    rounds.append((ours / theirs, ours, theirs))
                    if args.verbose:
                        print(f"  {case[0]}: {ours / 1e6:.2f} {theirs / 1e6:.2f} Mpps {quiet_a} {quiet_b}", file=sys.stderr)
                    quiet = quiet and quiet_a and quiet_b
                ratio, ours, theirs = sorted(rounds)[len(rounds) // 2]
                note = "" if quiet else "  (contended)"
                if case[2] == 1:
                    # Two frames are in flight, so each takes this long through switch and client.
                    a, b = 2e6 / ours, 2e6 / theirs
                    print(f"{case[0]:24} {a:8.2f}us {b:8.2f}us {1 / ratio:6.2f}{note}", flush=True)
                else:
                    print(f"{case[0]:24} {ours / 1e6:6.2f}Mpps {theirs / 1e6:6.2f}Mpps {ratio:6.2f}{note}", flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
