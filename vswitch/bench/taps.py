#!/usr/bin/env python3
"""Compare nacre-switch with Open vSwitch's userspace datapath between network namespaces, and print ratios.

Two namespaces, each with one end of a cable whose other end is a port of the switch under test: a tap of the switch
itself, or a veth pair. iperf3 moves bytes by TCP between them, in turns through either switch; the ratio is the
median of the rounds. Between pings a fifth of a second apart the switch sleeps, so their round trip holds two
wake-ups. At rest the switch's processor time is what it costs to have it.

Needs root and the Debian packages openvswitch-switch-dpdk, iperf3, iproute2 and iputils-ping.

    cargo build --release -p daemons --bin nacre-switch
    vswitch/bench/taps.py target/release/nacre-switch
"""
import argparse, contextlib, json, os, pathlib, re, shutil, signal, statistics, subprocess, sys, tempfile, time

from compare import BRIDGE, OVS_SWITCHD, TICK, need, open_vswitch, stop

NAMES = ("nacre-bench-a", "nacre-bench-b")


def run(*args):
    return subprocess.run([str(a) for a in args], check=True, capture_output=True, text=True).stdout


def inside(i, *args):
    return ["ip", "netns", "exec", NAMES[i], *args]


@contextlib.contextmanager
def namespaces():
    try:
        for name in NAMES:
            run("ip", "netns", "add", name)
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


def move(i, link):
    """Gives a namespace its interface, once that exists."""
    for _ in range(100):
        if os.path.exists(f"/sys/class/net/{link}"):
            break
        time.sleep(0.1)
    run("ip", "link", "set", "dev", link, "netns", NAMES[i])
    run(*inside(i, "ip", "address", "add", f"10.77.0.{i + 1}/24", "dev", link))
    run(*inside(i, "ip", "link", "set", "dev", link, "up"))


def cables():
    """Two veth pairs; their near ends stay here."""
    for i in (0, 1):
        run("ip", "link", "add", f"nb-near{i}", "type", "veth", "peer", "name", f"nb-far{i}")
        run("ip", "link", "set", "dev", f"nb-near{i}", "up")
        move(i, f"nb-far{i}")


@contextlib.contextmanager
def nacre(binary, work, kind):
    if kind == "veth":
        cables()
        ports = ["--uplink", "nb-near0", "--uplink", "nb-near1"]
    else:
        ports = ["--tap", "nb-tap0", "--tap", "nb-tap1"]
    with open(work / "nacre.log", "w") as log:
        p = subprocess.Popen([binary, *ports], stdout=log, stderr=log)
    try:
        if kind == "tap":
            [move(i, f"nb-tap{i}") for i in (0, 1)]
        yield p.pid
    finally:
        stop(p)


@contextlib.contextmanager
def ovs(work, kind):
    with open_vswitch(work, "other_config:userspace-tso-enable=true") as (switchd, _, _, call):
        if kind == "veth":
            cables()
        for i in (0, 1):
            if kind == "veth":
                call("add-port", BRIDGE, f"nb-near{i}")
            else:
                call("add-port", BRIDGE, f"nb-tap{i}", "--", "set", "Interface", f"nb-tap{i}", "type=tap")
                move(i, f"nb-tap{i}")
        yield switchd.pid


def cpu(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def measure(pid, seconds):
    """Gbit/s, processor seconds of the switch a gigabyte, median round trip in microseconds, share of a core at rest."""
    run(*inside(0, "ping", "-c", "1", "-w", "20", "10.77.0.2"))
    server = subprocess.Popen(inside(1, "iperf3", "-s", "-1"), stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    try:
        time.sleep(0.5)
        before = cpu(pid)
        result = json.loads(run(*inside(0, "iperf3", "-c", "10.77.0.2", "-t", str(seconds), "-J")))
        spent = cpu(pid) - before
    finally:
        stop(server)
    received = result["end"]["sum_received"]
    pings = run(*inside(0, "ping", "-c", "20", "-i", "0.2", "10.77.0.2"))
    trip = statistics.median(float(t) for t in re.findall(r"time=([\d.]+) ms", pings)) * 1000
    before = cpu(pid)
    time.sleep(5)
    return received["bits_per_second"] / 1e9, spent / (received["bytes"] / 1e9), trip, (cpu(pid) - before) / 5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", help="nacre-switch, built with --release")
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs a case")
    parser.add_argument("--only", choices=("tap", "veth"))
    args = parser.parse_args()
    # Ended from outside, it cleans up all the same.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    need(OVS_SWITCHD, "openvswitch-switch-dpdk")
    need("iperf3", "iperf3")
    work = pathlib.Path(tempfile.mkdtemp(prefix="nacre-bench-"))
    try:
        print(f"{'case':28} {'nacre':>10} {'ovs':>10} {'ratio':>6}")
        for kind in ("tap", "veth"):
            if args.only not in (None, kind):
                continue
            rounds = []
            for _ in range(args.rounds):
                with namespaces(), nacre(args.binary, work, kind) as pid:
                    ours = measure(pid, args.seconds)
                with namespaces(), ovs(work, kind) as pid:
                    theirs = measure(pid, args.seconds)
                rounds.append((ours, theirs))
            rows = ("TCP, Gbit/s", "processor seconds a GB", "round trip, us", "at rest, % of a core")
            for i, row in enumerate(rows):
                ours, theirs = ([r[who][i] for r in rounds] for who in (0, 1))
                scale = 100 if i == 3 else 1
                ratio = statistics.median(a / b if b else float("nan") for a, b in zip(ours, theirs))
                print(f"{kind + ': ' + row:28} {statistics.median(ours) * scale:10.2f} "
                      f"{statistics.median(theirs) * scale:10.2f} {ratio:6.2f}", flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
