#!/usr/bin/env python3
"""Measure what server_try and client_try cost, beside other servers on the same work: `make bench`.

All run in turn, round after round, on the same certificates; each server has one processor and
the load another, where there are two. nginx has the least to do: it answers without reading a
request. What to look at are the ratios: times differ from machine to machine, and from minute to
minute.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import os
import platform
import re
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from support import ROOT, tls_client, tls_server

CA, CERT, KEY = (os.path.join(ROOT, "auth", name) for name in ("test-ca/test-ca.cert", "server.crt", "server.key"))
CLIENT = [os.path.join(ROOT, "auth", name) for name in ("client.crt", "client.key")]
TRY = [sys.executable, os.path.join(ROOT, "server_try")]
NGINX = """
%(load_module)s
daemon off; pid "%(folder)s/nginx.pid"; error_log stderr; worker_processes 1;
events { worker_connections 2000; }
stream { server {
    listen 127.0.0.1:%(port)d ssl;
    ssl_certificate "%(cert)s"; ssl_certificate_key "%(key)s"; ssl_client_certificate "%(ca)s";
    ssl_verify_client on; ssl_protocols TLSv1.3; ssl_session_tickets off; ssl_session_cache off;
    return "42\\n";
} }
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--connections", type=int, default=100, help="of each server in each round")
    args = parser.parse_args()
    if min(args.rounds, args.connections) < 1:
        parser.error("--rounds and --connections are 1 or more")
    if not os.path.isdir("/proc/self"):
        sys.exit("bench: needs /proc, to see a server's processor time and memory")
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:  # to stop the servers even so
        signal.signal(number, lambda number, frame: sys.exit("bench: stopped"))
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, processors[-1:])  # the load's; the servers get the first
    print(f"{platform.system()} {platform.machine()}, {len(processors)} processors, Python {platform.python_version()}, "
          f"{ssl.OPENSSL_VERSION}, {key_type()}, {args.rounds} rounds")
    try:
        results = measure(args, processors[0])
    except OSError as error:
        sys.exit(f"bench: {error}")
    progress("")
    report(results)


def measure(args, processor):
    """Return the figures of each thing measured, a list for each; servers run on one processor."""
    results = {}

    def note(name, value):
        results.setdefault(name, []).append(value)

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        commands = servers(folder)
        running = {name: stack.enter_context(run(name, command, port, processor))
                   for name, (command, port) in commands.items()}
        for number in range(args.rounds):
            progress(f"round {number + 1} of {args.rounds}: new connections")
            note("floor", handshake_in_memory())
            todo = [(name, name, 8) for name in running] + [(f"server_try {clients}", "server_try", clients) for clients in (1, 50, 200)]
            first = number % len(todo)  # each has its turn at being the first, when caches are cold
            for what, name, clients in todo[first:] + todo[:first]:
                note(what, processor_time(*running[name], args.connections, clients))
            progress(f"round {number + 1} of {args.rounds}: requests")
            for name in ("server_try", "s_server")[:: -1 if number % 2 else 1]:
                note(f"{name} one by one", one_by_one(running[name][1]))
            note("at once", all_at_once(running["server_try"][1]))
            progress(f"round {number + 1} of {args.rounds}: whole clients")
            port = running["server_try"][1]
            note("client_try", wall([sys.executable, os.path.join(ROOT, "client_try"), "--port", str(port), CA, *CLIENT]))
            note("import", wall([sys.executable, "-c", "import ssl, socket"]))
    progress("memory")
    with run("server_try", *commands["server_try"], processor) as (pid, port):
        empty, idle = memory(pid, port)
    note("empty", empty)
    note("idle", idle)
    return results


def key_type():
    """Return what kind of keys the certificates have."""
    text = subprocess.run(["openssl", "x509", "-in", CERT, "-noout", "-text"], stdout=subprocess.PIPE, check=True).stdout.decode()
    return re.search(r"Public.Key: \(.*?\)|$", text)[0] + re.search(r"Public Key Algorithm: (\S+)|$", text)[0].replace("Public Key Algorithm:", "")


def servers(folder):
    """Return the command and the port of each server to compare."""
    names = ["server_try", "s_server", "nginx"]
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in names]
        ports = {name: listener.getsockname()[1] for name, listener in zip(names, listeners)}
    found = {
        "server_try": TRY + ["--port", str(ports["server_try"]), CA, CERT, KEY],
        "s_server": ["openssl", "s_server", "-quiet", "-rev", "-tls1_3", "-num_tickets", "0", "-Verify", "1",
                     "-verify_return_error", "-CAfile", CA, "-cert", CERT, "-key", KEY, "-accept", str(ports["s_server"])],
    }
    nginx, load_module = find_nginx()
    if nginx:
        with open(os.path.join(folder, "nginx.conf"), "w") as file:
            file.write(NGINX % dict(load_module=load_module, folder=folder, port=ports["nginx"], ca=CA, cert=CERT, key=KEY))
        found["nginx"] = [nginx, "-c", file.name]
    else:
        print("nginx with its stream module is not installed: left out")
    return {name: (command, ports[name]) for name, command in found.items()}


def find_nginx():
    """Return nginx's path and what its configuration needs for the stream module; None and None without them."""
    nginx = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if nginx:
        if "--with-stream " in subprocess.run([nginx, "-V"], stderr=subprocess.PIPE).stderr.decode() + " ":
            return nginx, ""
        for folder in "/usr/lib/nginx/modules", "/usr/share/nginx/modules", "/usr/lib64/nginx/modules":
            if os.path.exists(folder + "/ngx_stream_module.so"):
                return nginx, f'load_module "{folder}/ngx_stream_module.so";'
    return None, None


@contextlib.contextmanager
def run(name, command, port, processor):
    """Run a server on one processor; give its process ID and port when it listens, and stop it."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               preexec_fn=lambda: os.sched_setaffinity(0, [processor]))
    with process:
        # What it logs is read, as a journal would, on the load's processor.
        last = collections.deque(maxlen=1)
        reader = threading.Thread(target=last.extend, args=[process.stderr], daemon=True)
        reader.start()
        try:
            deadline = time.monotonic() + 10
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    if process.poll() is not None or time.monotonic() > deadline:
                        reader.join(1)
                        sys.exit(f"bench: {name} does not start: {b''.join(last).decode().strip()}")
                    time.sleep(0.02)
            yield process.pid, port
        finally:
            process.terminate()
            reader.join()


def progress(text):
    """Show on a terminal what is being done."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def connect(port, context):
    raw = socket.create_connection(("127.0.0.1", port), 30)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return context.wrap_socket(raw, server_hostname="example.com")


def ask(tls):
    """Send 41, and see that an answer comes; it is 42, or from `s_server -rev` 14."""
    tls.sendall(b"41\n")
    answer = tls.recv(10)
    if answer not in (b"42\n", b"14\n"):
        raise OSError(f"a server answered {answer!r}")


def close(tls):
    """Close as client_try does: with a close_notify, not waiting for the server's."""
    with contextlib.suppress(OSError):
        tls.settimeout(0)
        tls.unwrap()
    tls.close()


def processes(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        return [pid, *map(int, children.read().split())]


def seconds_used(pid):
    """Return the processor time of a process, its children and all their threads so far, in seconds."""
    # What clock_getcpuclockid(3) returns: finer than the ticks of /proc/PID/stat.
    return sum(time.clock_gettime(~one << 3 | 2) for one in processes(pid))


def processor_time(pid, port, connections, clients):
    """Return the server's processor seconds for a new connection with one request."""
    context, each = tls_client(folder=ROOT), max(1, connections // clients)
    start = threading.Barrier(clients)

    def client(_):
        start.wait()
        for _ in range(each):
            tls = connect(port, context)
            ask(tls)
            close(tls)

    before = seconds_used(pid)
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    time.sleep(0.05)  # for the last close
    return (seconds_used(pid) - before) / (each * clients)


def handshake_in_memory(count=50):
    """Return the processor seconds of the server's half of a handshake, with no socket at all."""
    server = tls_server(folder=ROOT)
    context = tls_client(folder=ROOT)
    times = []
    for _ in range(count):
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        ours = server.wrap_bio(up, down, server_side=True)
        theirs = context.wrap_bio(down, up, server_hostname="example.com")
        spent = 0
        for _ in range(2):
            with contextlib.suppress(ssl.SSLWantReadError):
                theirs.do_handshake()
            begun = time.process_time()
            with contextlib.suppress(ssl.SSLWantReadError):
                ours.do_handshake()
            spent += time.process_time() - begun
        times.append(spent)
    return statistics.median(times)


def one_by_one(port, count=1000):
    """Return how many requests a second one connection gets answered, each sent after the last reply."""
    tls = connect(port, tls_client(folder=ROOT))
    for number in range(-count // 5, count):
        if number == 0:  # both ends are warm by now
            begun = time.monotonic()
        ask(tls)
    seconds = time.monotonic() - begun
    close(tls)
    return count / seconds


def all_at_once(port, batch=16000, batches=5):
    """Return how many requests a second one connection gets answered, sent thousands at once."""
    tls = connect(port, tls_client(folder=ROOT))
    requests, size = b"41\n" * batch, 3 * batch
    begun = time.monotonic()
    for _ in range(batches):
        tls.sendall(requests)
        received = 0
        while received < size:
            part = tls.recv(65536)
            if not part:
                raise OSError("a server hung up")
            received += len(part)
    seconds = time.monotonic() - begun
    close(tls)
    return batch * batches / seconds


def wall(command):
    """Return the seconds that a whole command takes."""
    begun = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - begun


def memory(pid, port, clients=500):
    """Return the kB resident before the first client, and how many each idle one adds."""
    def resident():
        with open(f"/proc/{pid}/status") as status:
            return int(status.read().partition("VmRSS:")[2].split()[0])

    empty, context, connections = resident(), tls_client(folder=ROOT), []
    for _ in range(clients):
        tls = connect(port, context)
        connections.append(tls)
        ask(tls)
    each = (resident() - empty) / clients
    for tls in connections:
        close(tls)
    return empty, each


def report(results):
    """Print the table: medians, and the medians of each round's ratios."""
    def row(what, figure, ratio=""):
        print(f"| {what:<58} | {figure:>14} | {ratio:<36} |")

    def middle(name):
        return statistics.median(results[name])

    def times(name, *others):
        return ", ".join(f"{statistics.median(a / b for a, b in zip(results[name], results[other])):.2f} × {other}"
                         for other in others if other in results)

    row("what", "server_try", "beside")
    row("---", "---", "---")
    row("server CPU a new connection with a request, 8 clients", f"{middle('server_try') * 1000:.2f} ms",
        times("server_try", "nginx", "s_server"))
    row("of that, the handshake alone, in memory", f"{middle('floor') * 1000:.2f} ms", times("floor", "server_try"))
    row("the same with 1, 50, 200 clients at once", "", ", ".join(
        times(f"server_try {clients}", "server_try").split()[0] for clients in (1, 50, 200)) + " × that")
    row("requests a second on one connection, one by one", f"{middle('server_try one by one'):,.0f}",
        times("server_try one by one", "s_server one by one"))
    row("requests a second on one connection, sent all at once", f"{middle('at once'):,.0f}")
    row("memory before the first client", f"{middle('empty') / 1024:.1f} MB")
    row("memory an idle client, of 500", f"{middle('idle'):.0f} kB")
    row("a whole client_try", f"{middle('client_try') * 1000:.0f} ms", times("client_try", "import"))


if __name__ == "__main__":
    main()
