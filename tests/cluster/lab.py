"""Three hosts in network and process namespaces, etcd, shared storage, and guests on the software CPU."""
import json
import os
import shutil
import signal
import socketserver
import struct
import subprocess
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(os.path.dirname(HERE))
IO, DOG = 1, 6  # seconds
DEAD = 8 * IO + DOG
WAIT = 600  # seconds: how long anything may take on a busy machine


def need(program, package):
    if not shutil.which(program):
        raise SystemExit(f"{program} is missing: install the Debian package {package}")


def run(*command, **kw):
    return subprocess.run(command, check=True, **kw)


def until(what, condition, patience=WAIT):
    """Waits until the condition gives something, and gives it."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not in {patience} s: {what}")


def children(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], stdout=subprocess.PIPE).stdout
    return [int(p) for p in found.split()]


class Lab:
    def __init__(self, bin_dir, images):
        self.bin, self.images = bin_dir, images
        self.dir = tempfile.mkdtemp(prefix="nacre-lab-", dir="/dev/shm")
        self.tag = f"ncl{os.getpid()}"
        self.hosts, self.etcds, self.others, self.spaces = {}, {}, [], []
        # Of each host's wall clock, from when on it was wrong by how many seconds.
        self.clocks = {1: [], 2: [], 3: []}
        self.fence_works = True
        shutil.copy(os.path.join(HERE, "fence"), self.dir)

    # -- building

    def build(self):
        self.start_bmc()
        with open(self.path("key"), "w") as f:
            f.write("a secret of the test's own\n")
        with open(self.path("alarm"), "w") as f:
            f.write(f"#!/bin/sh\nexec cat >> {self.path('alarms')}\n")
        os.chmod(self.path("alarm"), 0o755)
        open(self.path("alarms"), "w").close()
        run("cc", "-shared", "-fPIC", "-O1", "-Wall", "-o", self.path("wrong_clock.so"),
            os.path.join(HERE, "wrong_clock.c"))
        for n in (1, 2, 3):
            self.set_clock(n, 0)
        self.hub = f"{self.tag}h"
        self.netns(self.hub)
        self.ip(self.hub, "link", "add", "br0", "type", "bridge")
        self.ip(self.hub, "link", "set", "br0", "up")
        for n in (1, 2, 3):
            self.ip(self.hub, "address", "add", f"10.77.0.{100 + n}/24", "dev", "br0")
            self.netns(self.ns(n))
            run("ip", "link", "add", f"{self.tag}v{n}", "type", "veth", "peer", "name", f"{self.tag}e{n}")
            run("ip", "link", "set", f"{self.tag}v{n}", "netns", self.hub)
            run("ip", "link", "set", f"{self.tag}e{n}", "netns", self.ns(n))
            self.ip(self.hub, "link", "set", f"{self.tag}v{n}", "master", "br0", "up")
            self.ip(self.ns(n), "link", "set", f"{self.tag}e{n}", "name", "eth0")
            self.ip(self.ns(n), "link", "set", "eth0", "up")
            self.ip(self.ns(n), "address", "add", f"10.77.0.{n}/24", "dev", "eth0")
        self.make_certificates()
        for n in (1, 2, 3):
            self.start_etcd(n)
        self.make_storage()
        self.make_guest()

    def path(self, *parts):
        return os.path.join(self.dir, *parts)

    def ns(self, n):
        return f"{self.tag}n{n}"

    def netns(self, name):
        run("ip", "netns", "add", name)
        self.spaces.append(name)
        self.ip(name, "link", "set", "lo", "up")

    def ip(self, ns, *command):
        run("ip", "-n", ns, *command)

    def start_bmc(self):
        """The power controllers of all hosts. A host is off when nothing is left in its process namespace."""
        lab = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                action, plug = self.rfile.readline().decode().split()
                host = lab.hosts[int(plug)]
                if not lab.fence_works:
                    answer = "broken"
                elif action == "status":
                    answer = "on" if host.poll() is None else "off"
                else:
                    if action == "off":
                        lab.power_off(int(plug))
                    answer = "done"
                self.wfile.write(f"{answer}\n".encode())

        self.bmc = socketserver.ThreadingUnixStreamServer(self.path("bmc"), Handler)
        threading.Thread(target=self.bmc.serve_forever, daemon=True).start()

    def power_off(self, n):
        """Kills the first process of a host's namespace, and the kernel kills the rest."""
        for first in children(self.hosts[n].pid):
            try:
                os.kill(first, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def start_etcd(self, n):
        members = ",".join(f"m{i}=http://10.77.0.{100 + i}:2380" for i in (1, 2, 3))
        at = f"http://10.77.0.{100 + n}"
        old = os.path.exists(self.path(f"etcd{n}"))
        log = open(self.path(f"etcd{n}.log"), "a")
        self.etcds[n] = subprocess.Popen(
            ["ip", "netns", "exec", self.hub, "etcd", "--name", f"m{n}", "--data-dir", self.path(f"etcd{n}"),
             "--listen-peer-urls", f"{at}:2380", "--initial-advertise-peer-urls", f"{at}:2380",
             "--listen-client-urls", f"{at}:2379", "--advertise-client-urls", f"{at}:2379",
             "--initial-cluster", members, "--initial-cluster-state", "existing" if old else "new"],
            stdout=log, stderr=log)

    def make_certificates(self):
        """Of one authority for each host, as server of its address and as client."""
        def openssl(*command):
            run("openssl", *command, cwd=self.dir, stderr=subprocess.DEVNULL)

        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        openssl("req", *key, "-x509", "-days", "2", "-subj", "/CN=lab", "-keyout", "ca-key.pem", "-out", "ca-cert.pem")
        for n in (1, 2, 3):
            os.mkdir(self.path(f"pki{n}"))
            shutil.copy(self.path("ca-cert.pem"), self.path(f"pki{n}"))
            for end in ("server", "client"):
                file = f"pki{n}/{end}"
                openssl("req", *key, "-subj", f"/CN=host-{n}", "-addext", f"subjectAltName=IP:10.77.0.{n}",
                        "-keyout", f"{file}-key.pem", "-out", f"{file}-request.pem")
                openssl("x509", "-req", "-in", f"{file}-request.pem", "-copy_extensions", "copy", "-days", "2",
                        "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-out", f"{file}-cert.pem")

    def make_storage(self):
        """Leases on a file behind nbdkit, so that the volume can be made to hang; the disks are plain files."""
        area = self.path("leases.raw")
        with open(area, "wb") as f:
            f.truncate(16 << 20)
        self.nbdkit = subprocess.Popen(["nbdkit", "-f", "-U", self.path("nbd"), "file", area])
        self.others.append(self.nbdkit)
        until("nbdkit's socket", lambda: os.path.exists(self.path("nbd")))
        os.mkdir(self.path("shared"))
        leases = self.path("shared", "leases")
        open(leases, "w").close()
        fuse = subprocess.Popen(["nbdfuse", leases, f"nbd+unix:///?socket={self.path('nbd')}"])
        self.others.append(fuse)
        until("the lease volume", lambda: os.path.getsize(leases) == 16 << 20)
        run(f"{self.bin}/nacre", "cluster", "format", leases, "--space", "lab", "--areas", "8",
            "--io-timeout", str(IO), "--force")

    def make_guest(self):
        extra = self.path("extra")
        os.mkdir(extra)
        shutil.copy(os.path.join(HERE, "guest-init"), os.path.join(extra, "init"))
        os.chmod(os.path.join(extra, "init"), 0o755)
        os.mkdir(os.path.join(extra, "modules"))
        shutil.copy(os.path.join(self.images, "modules/kernel/drivers/misc/pvpanic/pvpanic-mmio.ko"),
                    os.path.join(extra, "modules"))
        cpio = run("cpio", "-o", "-H", "newc", input=b"init\nmodules/pvpanic-mmio.ko\n", cwd=extra, stdout=subprocess.PIPE,
                   stderr=subprocess.DEVNULL).stdout
        with open(os.path.join(self.images, "initrd"), "rb") as f:
            base = f.read()
        # The kernel unpacks both; the later file replaces the earlier.
        with open(self.path("initrd"), "wb") as f:
            f.write(base + b"\0" * (-len(base) % 512) + cpio)

    # -- hosts

    def config(self, n):
        fence = [[{"program": self.path("fence"), "parameters": {"plug": str(h)}}] for h in (1, 2, 3)]
        hosts = [{"id": h, "addresses": [f"10.77.0.{h}:7400"], "fence": [fence[h - 1]]} for h in (1, 2, 3)]
        return {
            "host": n, "name": f"host-{n}", "hosts": hosts,
            "links": [{"local": f"10.77.0.{n}:7400", "group": "239.77.0.1:7401"}],
            "key": self.path("key"), "state": self.path(f"state{n}"), "socket": self.path(f"api{n}"),
            "migration": {"port": 7600, "certificates": self.path(f"pki{n}")},
            "store": {"etcd": {"endpoints": [f"http://10.77.0.{100 + i}:2379" for i in (1, 2, 3)],
                               "prefix": "/lab"}},
            "volumes": [{"path": self.path("shared", "leases"), "space": "lab"}],
            "timing": {"io_timeout": IO, "watchdog": DOG},
            "watchdog": {"pipe": self.path(f"dog{n}")},
            "witness": {"lockspace": 0, "index": 0},
            "capacity": {"cpu": 4000, "memory": 1024},
            "heartbeat": {"interval": 500, "misses": 6, "settle": 2000, "stop": 6000},
            "ha": {"health": {"interval": 1000, "heartbeat": 8000}, "isolation": 3000, "repeat": 500, "patience": 120000,
                   "restart": {"limit": 20, "window": 600000, "backoff": 500, "longest": 2000, "parallel": 4}},
            "fencing": {"deadline": 10000, "poll": 100, "confirm": 20000, "attempts": 2, "pause": 2000},
            "stop_grace": 3000,
            # The first action fails, so the second one answers.
            "rules": [{"kind": "host.fenced", "severity": "error", "actions": [
                {"script": {"program": "/bin/false", "seconds": 5}},
                {"script": {"program": self.path("alarm"), "seconds": 5}}]}],
        }

    def power_on(self, n):
        config = self.path(f"node{n}.json")
        with open(config, "w") as f:
            json.dump(self.config(n), f)
        log = open(self.path(f"host{n}.log"), "a")
        # What it leaves of a former life would confuse whoever waits for this one.
        for name in (f"api{n}", f"dog{n}.agent"):
            if os.path.exists(self.path(name)):
                os.unlink(self.path(name))
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.ns(n), "unshare", "--pid", "--fork", "--kill-child", "--mount-proc",
             os.path.join(HERE, "supervisor"), str(DOG), self.path(f"dog{n}"),
             "env", f"LD_PRELOAD={self.path('wrong_clock.so')}", f"NACRE_TEST_CLOCK={self.path(f'clock{n}')}",
             f"{self.bin}/nacre-node", "--config", config, "--nacre", f"{self.bin}/nacre"],
            stdout=log, stderr=log, start_new_session=True)
        self.hosts[n] = process

    def is_on(self, n):
        return self.hosts[n].poll() is None

    def agent_pid(self, n):
        """The agent's process number outside of its namespace."""
        [first] = children(self.hosts[n].pid)
        for pid in children(first):
            with open(f"/proc/{pid}/cmdline", "rb") as f:
                if b"nacre-node" in f.read():
                    return pid
        raise AssertionError(f"host {n} has no agent")

    def link(self, n, way):
        """What goes through a host's link: everything (`both`), nothing (`none`), only what it sends (`out`), or only what
        the others send to it (`in`)."""
        self.ip(self.hub, "link", "set", f"{self.tag}v{n}", "down" if way == "none" else "up")
        for ns, port, cut in ((self.ns(n), "eth0", way == "in"), (self.hub, f"{self.tag}v{n}", way == "out")):
            if cut:
                # A queue of one byte, into which no packet fits.
                run("tc", "-n", ns, "qdisc", "replace", "dev", port, "root", "bfifo", "limit", "1")
            elif way == "both":
                # There is none to delete where nothing was cut.
                subprocess.run(["tc", "-n", ns, "qdisc", "delete", "dev", port, "root"], stderr=subprocess.DEVNULL)

    def set_clock(self, n, offset):
        """The wall clock of a host goes wrong by this many seconds. Its monotonic clock does not see it."""
        with open(self.path(f"clock{n}"), "r+b" if self.clocks[n] else "wb") as f:
            f.write(struct.pack("=q", offset))
        self.clocks[n].append((time.time(), offset))

    def true_time(self, n, told):
        """When a host wrote an event, in seconds by the test's clock."""
        until_ = time.time()
        for since, offset in reversed(self.clocks[n]):
            if since <= told / 1000 - offset <= until_:
                return told / 1000 - offset
            until_ = since
        raise AssertionError(f"host {n} told the time {told}, but its clock was wrong by {self.clocks[n]}")

    def ask(self, n, *command):
        """Runs `nacre cluster`; None when no agent answers."""
        p = subprocess.run([f"{self.bin}/nacre", "cluster", *command, "--json", "--socket", self.path(f"api{n}")],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return json.loads(p.stdout) if p.stdout else None

    def status(self, n):
        reply = self.ask(n, "status") if self.is_on(n) else None
        return reply.get("status") if reply else None

    def ready(self, *hosts, power_on=None):
        """All of these hosts are quorate, hold their leases and agree on the coordinator. The host `power_on` is switched
        on whenever it is found off."""
        def check():
            if power_on and not self.is_on(power_on):
                self.power_on(power_on)
            all_ = [self.status(n) for n in hosts]
            good = all(s and s["quorate"] and s["leases"][0]["generation"] for s in all_)
            return good and len({s["coordinator"] for s in all_}) == 1 and all_[0]["coordinator"] in hosts
        until(f"hosts {hosts} are ready", check)

    def coordinator(self):
        for n in self.hosts:
            s = self.status(n)
            if s and s["quorate"] and s["coordinator"]:
                return s["coordinator"]
        return None

    def order(self, *command):
        """Gives an order to the coordinator, whoever that is."""
        def try_():
            n = self.coordinator()
            return n and self.ask(n, *command) == "done"
        until(f"nacre cluster {' '.join(command)}", try_)

    # -- guests

    def start_vm(self, vm, line=""):
        disk = self.path(f"disk{vm}.raw")
        with open(disk, "wb") as f:
            f.truncate(2 << 20)
        definition = {
            "accel": "soft", "memory": {"size": 96 << 20},
            "boot": {"kernel": f"{self.images}/vmlinuz", "initrd": self.path("initrd"),
                     "command_line": f"console=ttyS0 quiet {line}"},
            "console": {"file": self.path(f"console{vm}")},
            "console_ports": [{"to": "off"}, {"to": "off", "name": "nacre.heartbeat"}],
            "disks": [{"path": disk, "format": "raw"}],
        }
        spec = {"id": vm, "demand": {"cpu": 500, "memory": 128}, "disks": [{"lockspace": 0, "index": vm}],
                "definition": json.dumps(definition)}
        with open(self.path(f"vm{vm}.json"), "w") as f:
            json.dump(spec, f)
        self.order("start", self.path(f"vm{vm}.json"))

    def vm_pid(self, host, vm):
        """The number of a VM's process outside of its namespace."""
        file = self.path(f"state{host}", "vms", f"{vm}.json")
        found = subprocess.run(["pgrep", "-f", f"run --restart --config {file}"], stdout=subprocess.PIPE).stdout
        [pid] = [int(p) for p in found.split()]
        return pid

    def records(self, vm):
        with open(self.path(f"disk{vm}.raw"), "rb") as f:
            data = f.read()
        found = []
        for at in range(0, len(data), 512):
            text = data[at:at + 512].rstrip(b"\0 \n").decode(errors="replace")
            if not text:
                break
            found.append(text.split())
        return found

    def writer(self, vm):
        """Who wrote last."""
        records = self.records(vm)
        return records[-1][2] if records else None

    def place(self, vm):
        """The host on which the VM runs, by what the hosts themselves say."""
        for n in self.hosts:
            s = self.status(n)
            if s and any(v["vm"] == vm and v["status"] == "running" for v in s["vms"]):
                return n
        return None

    def running(self, vm, other_than=None):
        """Waits until the guest writes (as another life than this one); gives who writes."""
        def check():
            now = self.writer(vm)
            return now if now != other_than else None
        return until(f"VM {vm} writes", check)

    def grows(self, vm, life):
        """The same life of the guest goes on writing."""
        before = len(self.records(vm))
        until(f"VM {vm} goes on", lambda: len(self.records(vm)) > before + 3)
        assert self.writer(vm) == life, f"VM {vm} was restarted"

    def check_disk(self, vm, lives):
        """Each life wrote one unbroken stretch, in the order of the lives: nobody wrote at the same time."""
        records = self.records(vm)
        order = []
        for n, record in enumerate(records):
            assert record[:2] == ["rec", str(n)], f"disk {vm}: record {n} is {record}"
            if not order or order[-1] != record[2]:
                order.append(record[2])
        assert order == lives, f"disk {vm}: written by {order}, but the guest's lives were {lives}"

    def events(self, n):
        with open(self.path(f"state{n}", "events")) as f:
            return [json.loads(line) for line in f if line.endswith("}\n")]

    # -- the end

    def close(self):
        if os.path.exists(self.path("nbd")):
            self.nbdkit.send_signal(signal.SIGCONT)
        for n, p in self.hosts.items():
            self.power_off(n)
            p.wait()
        self.bmc.shutdown()
        self.bmc.server_close()
        for p in self.etcds.values():
            p.kill()
            p.wait()
        if os.path.ismount(self.path("shared", "leases")):
            subprocess.run(["umount", self.path("shared", "leases")])
        for p in self.others:
            p.terminate()
            p.wait()
        for ns in self.spaces:
            subprocess.run(["ip", "netns", "del", ns])
        shutil.rmtree(self.dir, ignore_errors=True)

    def tell(self):
        """Prints what helps to understand a failure."""
        for n in self.hosts:
            for name in (f"host{n}.log",):
                with open(self.path(name), errors="replace") as f:
                    lines = f.read().splitlines()
                print(f"--- {name}", *lines[-40:], sep="\n")
