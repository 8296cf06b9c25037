"""What the tests share: certificates from the real Makefile, and the real scripts as processes."""

import atexit
import contextlib
import functools
import glob
import os
import re
import select
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest

os.environ.update(SSL_CERT_FILE=os.devnull, SSL_CERT_DIR=os.devnull)  # openssl would load all of the system's CAs, each time
os.environ.pop("PYTHONUNBUFFERED", None)  # it would hide a flush that is missing
signal.signal(signal.SIGTERM, signal.default_int_handler)  # which ends the tests as Ctrl-C does: nothing is left
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PATIENCE = 60  # seconds that anything may take on a loaded machine before a test calls it stuck

PYTHON = [sys.executable, "-S"]  # which finds no package that is installed
MAKE = os.environ.get("MAKE", "make")  # the one that runs the tests
FAST = "NEWKEY=ec -pkeyopt ec_paramgen_curve:P-256 -pkeyopt ec_param_enc:named_curve"
ALL = "-j8 certs alt-certs odd-certs"
MADE = "SERVER_TRY_MADE"  # in the environment: where the tests' main process has made all that for the others
CA = "auth/test-ca/test-ca.cert"
SERVER = ("auth/server.crt", "auth/server.key")
CLIENT = ("auth/client.crt", "auth/client.key")

# Lines of the logs, whole; what differs from run to run is a pattern.
LISTENING = r"listening on .*:(\d+)"
PEER = r"127\.0\.0\.1:\d+: "  # how a line about a peer begins
UNTIL = r"\(serial \w+, until \w+ [ \d]\d [\d:]{8} 20\d\d GMT\)"
EXAMPLE = "CN=example.com, OU=%s, O=MegaCorp Inc, L=Hamilton, ST=Waikato, C=NZ"
SHOWING = f"showing {EXAMPLE % 'Server'} {UNTIL}"
TRUSTING = f"trusting {EXAMPLE % 'Trust Me'}, emailAddress=postmaster@example.com {UNTIL}"
ACCEPTED = PEER + rf"accepted %s {UNTIL}, TLSv1\.3, TLS_\w+"
CONNECTED = rf"connected to %s: {EXAMPLE % 'Server'} {UNTIL}, TLSv1\.3, TLS_\w+"
VERIFY = "turned away: certificate verify failed: "
# OpenSSL's own words, which differ between its versions.
EXPIRED = "certificate has expired"
NOT_YET_VALID = "certificate is not yet valid( or the system clock is incorrect)?"
WRONG_ROLE = "uns(uitable|upported) certificate purpose"
OWN_WORDS = ["self.signed", WRONG_ROLE, NOT_YET_VALID]
ANOTHER_CA = "(self.signed certificate in certificate chain|unable to get local issuer certificate|certificate signature failure)"
SECOND_CA = VERIFY + ANOTHER_CA


def copy_project(folder):
    """Copy to a new folder what the tests use of a clone, and return its name."""
    for name in ("auth/clients", "auth/servers", "tests"):
        os.makedirs(os.path.join(folder, name))
    for name in ("server_try", "client_try", "Makefile", "README.md", "auth/README.md", "auth/test-ca.conf", "auth/machines", "tests/demo",
                 "auth/clients/.gitignore", "auth/servers/.gitignore"):
        shutil.copy2(os.path.join(ROOT, name), os.path.join(folder, name))
    return folder


def readme(folder=""):
    """Return the text of the README of a folder."""
    with open(os.path.join(ROOT, folder, "README.md"), encoding="utf-8") as file:
        return file.read()


def plain_environment():
    """Return the environment without what the make that runs the tests would tell another make."""
    return {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}


def make_command(*arguments):
    """Return the command of a make that uses the Python of the tests, and keys that are made at once."""
    return [MAKE, "PYTHON=" + " ".join(PYTHON), FAST, *arguments]


def make(folder, *arguments, status=0, environment=None):
    """Run make in a folder; return what it printed, after a check of its exit status."""
    with subprocess.Popen(make_command(*arguments), cwd=folder, env=environment or plain_environment(), stdin=subprocess.DEVNULL,
                          start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            said = process.communicate(timeout=PATIENCE)[0].decode("utf-8", "backslashreplace")
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # whatever it has started
            raise
    if process.returncode != status:
        raise AssertionError(f"make {arguments} ended with {process.returncode}:\n{said}")
    return said


@functools.lru_cache(maxsize=None)
def template(*commands):
    """Return a clone in which make has done these commands; it is made once, and only to be copied."""
    if commands == (ALL,) and MADE in os.environ:
        return os.environ[MADE]
    folder = os.path.join(temporary_folder(), "clone")
    if not commands:
        return copy_project(folder)
    shutil.copytree(template(*commands[:-1]), folder)
    make(folder, *shlex.split(commands[-1]))
    return folder


def stuck(*_):
    """End a test that has taken too long; see TestCase.run."""
    raise AssertionError("the test was stuck")


def wait_until(condition, seconds=PATIENCE):
    """Wait until condition() is true; fail if that takes longer."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("the condition did not become true in time")
        time.sleep(0.02)


def shortened(script, **constants):
    """Return the path of a copy of a script with other constants, so that nobody waits a minute."""
    with open(os.path.join(ROOT, script), encoding="utf-8") as file:
        text = file.read()
    for name, value in constants.items():
        text, changed = re.subn(rf"(?m)^{name} = \S+", f"{name} = {value}", text)
        assert changed == 1, name
    path = os.path.join(temporary_folder(), script)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


def mistaken():
    """Return the path of a server_try with a bug, as somebody changing plus_one might add: 13 crashes it."""
    with open(os.path.join(ROOT, "server_try"), encoding="utf-8") as file:
        before, line, after = file.read().partition('    return b"%d\\n" % (int(request) + 1)\n')
    assert line
    path = os.path.join(temporary_folder(), "server_try")
    with open(path, "w", encoding="utf-8") as file:
        file.write(f'{before}    if request == b"13\\n":\n        request = nmber\n{line}{after}')
    return path


def temporary_folder():
    """Return a new folder that goes when the tests end."""
    folder = tempfile.mkdtemp(prefix="server_try-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def path_with(**scripts):
    """Return a PATH on which python3 and make are those of the tests, and these shell scripts are programs."""
    folder = temporary_folder()
    scripts.update(python3=f'exec {" ".join(map(shlex.quote, PYTHON))} "$@"\n', make=f'exec {shutil.which(MAKE)} "$@"\n')
    for name, script in scripts.items():
        with open(os.path.join(folder, name), "w") as file:
            file.write("#!/bin/sh\n" + script)
        os.chmod(file.name, 0o755)
    return folder + os.pathsep + os.environ["PATH"]


class Project:
    """One copy of the project with both CAs' certificates; what a test has a CA do, it does in a copy of its own."""

    folder = None

    @classmethod
    def get(cls):
        if cls.folder is None:
            folder = os.path.join(temporary_folder(), "a path with spaces, 'quotes\" and Gr\u00f6\u00dfe")
            shutil.copytree(template(ALL), folder)
            cls.folder = folder
        return cls.folder


class Process:
    """A process whose standard error is read line by line as it comes."""

    def __init__(self, *arguments, folder=None, **options):
        self.lines = []
        self.news = threading.Condition()
        options.setdefault("stdin", subprocess.DEVNULL)
        self.process = subprocess.Popen(arguments, cwd=folder or Project.get(), stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, **options)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        for line in self.process.stderr:
            with self.news:
                self.lines.append(line.decode("utf-8", "backslashreplace").rstrip("\n"))
                self.news.notify_all()
        with self.news:
            self.lines.append("")  # the end
            self.news.notify_all()

    def log(self):
        return "\n".join(self.lines)

    def wait_for(self, pattern, seconds=PATIENCE):
        """Wait for a line that is the pattern from end to end; return the match."""
        deadline = time.monotonic() + seconds
        seen = 0
        with self.news:
            while True:
                for line in self.lines[seen:]:
                    match = re.fullmatch(pattern, line)
                    if match:
                        return match
                    seen += 1
                left = deadline - time.monotonic()
                if left <= 0 or (self.lines and self.lines[-1] == ""):
                    raise AssertionError(f"no line like {pattern!r} in:\n{self.log()}")
                self.news.wait(left)

    @contextlib.contextmanager
    def halted(self):
        """Stop the process for the body of a with statement; it sees only the final result."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)  # which returns when it has stopped
        yield
        self.process.send_signal(signal.SIGCONT)

    def end(self, seconds=PATIENCE):
        """Wait for the end of the process; return its exit status."""
        status = self.process.wait(seconds)
        self.reader.join(seconds)
        return status

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.reader.join()
        self.process.stdout.close()
        self.process.stderr.close()


class Server(Process):
    """server_try on a free port, listening."""

    def __init__(self, *arguments, files=(CA, *SERVER), script="server_try", **options):
        super().__init__(*python(script), "--port", "0", *arguments, *files, **options)
        try:
            self.port = int(self.wait_for(LISTENING).group(1))
        except AssertionError:
            self.__exit__()
            raise

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.end()


def python(script, *arguments):
    """Return the command that runs a script, the project's or a path, with the Python of the tests."""
    return [*PYTHON, os.path.join(ROOT, script), *arguments]


def python_after(code, script, *arguments):
    """Return the command that runs a script after some code that changes what it finds."""
    start = f"import runpy, sys\nsys.argv = sys.argv[1:]\n{code}\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    return [*PYTHON, "-c", start, os.path.join(ROOT, script), *arguments]


def at_terminal_command(*arguments):
    """Return the command of a server_try whose controlling terminal is its standard input."""
    return [*PYTHON, "-c", "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
            "os.execv(sys.argv[1], sys.argv[1:])", *python("server_try"), *arguments]


def client_command(port, *arguments, files=(CA, *CLIENT)):
    return python("client_try", "--port", str(port), *arguments, *files)


def client(port, *arguments, files=(CA, *CLIENT), **options):
    """Run client_try to its end; return its status, standard output and standard error."""
    return run(*client_command(port, *arguments, files=files), **options)


def run(*command, folder=None, **options):
    """Run a command to its end; return its status, standard output and standard error."""
    options.setdefault("stdin", subprocess.DEVNULL)
    done = subprocess.run(command, cwd=folder or Project.get(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=PATIENCE, **options)
    return done.returncode, done.stdout.decode(), done.stderr.decode("utf-8", "backslashreplace")


def tls_context(protocol, certificate, folder=None):
    """Return a context of the ssl module that verifies its peer, and has the scripts' group."""
    folder = folder or Project.get()
    context = ssl.SSLContext(protocol)
    context.verify_mode = ssl.CERT_REQUIRED
    if ssl.OPENSSL_VERSION_INFO < (3, 5):
        context.set_ecdh_curve("prime256v1")
    context.load_verify_locations(os.path.join(folder, CA))
    if certificate:
        context.load_cert_chain(*(os.path.join(folder, name) for name in certificate))
    return context


def tls_client(certificate=CLIENT, folder=None):
    return tls_context(ssl.PROTOCOL_TLS_CLIENT, certificate, folder)


def tls_server(certificate=SERVER, folder=None):
    context = tls_context(ssl.PROTOCOL_TLS_SERVER, certificate, folder)
    context.num_tickets = 0
    return context


@contextlib.contextmanager
def connection(port, context=None):
    """An authenticated connection to server_try as client_try would have it, without client_try."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as raw:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with (context or tls_client()).wrap_socket(raw, server_hostname="example.com") as tls:
            yield tls


def served(port, certificate=CLIENT, folder=None):
    """Return what server_try replies to 41, without client_try."""
    with connection(port, tls_client(certificate, folder)) as tls:
        tls.sendall(b"41\n")
        return tls.recv(10)


@contextlib.contextmanager
def stuck_connection(port):
    """An authenticated connection that sends requests until no more go in, and reads nothing."""
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", port))
        with tls_client().wrap_socket(raw, server_hostname="example.com") as tls:
            tls.settimeout(0.5)
            with contextlib.suppress(socket.timeout):
                while True:
                    tls.sendall(b"1\n" * 1000)
            yield tls


def receive_all(tls):
    """Read to the end of a connection; a reset fails the test."""
    parts = []
    while part := tls.recv(65536):
        parts.append(part)
    return b"".join(parts)


@contextlib.contextmanager
def unread(command):
    """Start a server whose log is a pipe; give the process, its port, and both ends of that pipe, which nobody else reads."""
    reader, writer = os.pipe()
    with subprocess.Popen(command, cwd=Project.get(), stderr=writer) as process:
        try:
            said = b""
            while not re.search(rb"(?m)^listening .*\n", said):
                said += os.read(reader, 1000)
            yield process, int(said.rpartition(b":")[2]), reader, writer
        finally:
            process.kill()
            os.close(reader)
            os.close(writer)


def fill(writer):
    """Write into a pipe until no more goes in."""
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 100)
    os.set_blocking(writer, True)


class Relay:
    """Passes connections on to a port; a function may change or cut what the server sends.

    treat(data, passed, client) gets bytes from the server, how many came before, and the client's
    socket; it returns what to pass on, or raises ConnectionError to cut the connection.
    """

    def __init__(self, port, treat):
        self.target, self.treat = port, treat
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
                threading.Thread(target=self.relay, args=(client, server), daemon=True).start()

    def relay(self, client, server):
        passed = 0
        sources = {client: server, server: client}
        with client, server, contextlib.suppress(OSError):
            while sources:
                for source in select.select(list(sources), [], [])[0]:
                    data = source.recv(65536)
                    if not data:
                        sources.pop(source).shutdown(socket.SHUT_WR)
                    elif source is client:
                        server.sendall(data)
                    else:
                        client.sendall(self.treat(data, passed, client))
                        passed += len(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.close()


def reset(sock):
    """Close a socket with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class TestCase(unittest.TestCase):
    """Shows long texts whole, gives up a test that is stuck, and has the assertions that most tests need."""

    maxDiff = None

    def run(self, result=None):
        """Run the test as unittest does, but for ten minutes at the most: then whatever it waits for raises."""
        signal.signal(signal.SIGALRM, stuck)
        signal.setitimer(signal.ITIMER_REAL, 10 * PATIENCE, PATIENCE)  # and again, in case its cleanup is stuck, too
        try:
            return super().run(result)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def assertLine(self, line, pattern):
        """A line is the pattern from end to end."""
        self.assertRegex(line, rf"\A(?:{pattern})\Z")

    def assertRefused(self, result, pattern):
        """A client_try printed nothing, ended with 1, and its last line is the pattern."""
        status, output, errors = result
        self.assertEqual((status, output), (1, ""), errors)
        self.assertLine(errors.splitlines()[-1], f"client_try: {PEER}{pattern}")
        self.assertNotRegex(errors, r"Traceback|_ssl\.c")


class Home(TestCase):
    """Each test has a clone of its own, in which make has done some commands."""

    commands = ()

    def setUp(self):
        self.folder = os.path.join(temporary_folder(), "a 'home\" f\u00fcr")
        shutil.copytree(template(*self.commands), self.folder)

    def path(self, name):
        return os.path.join(self.folder, name)

    def make(self, *arguments, **options):
        return make(self.folder, *arguments, **options)

    def start(self, *arguments, output=subprocess.DEVNULL):
        """Start make in a process group of its own, as a shell does."""
        return subprocess.Popen(make_command(*arguments), cwd=self.folder, env=plain_environment(), start_new_session=True,
                                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

    def read_to(self, process, begin):
        """Read what a process prints, as far as a line that begins so."""
        self.assertTrue(any(line.startswith(begin) for line in process.stdout), begin)

    def openssl(self, *arguments, status=0):
        ended, output, errors = run("openssl", *arguments, folder=self.folder)
        self.assertEqual(ended, status, output + errors)
        return output

    def verify(self, certificate, *options, ca=CA, status=0):
        self.openssl("verify", "-x509_strict", *options, "-CAfile", ca, certificate, status=status)

    def false_openssl(self, script):
        """Make a shell script that make is told to take for openssl; return that setting."""
        with open(self.path("openssl"), "w") as file:
            file.write("#!/bin/sh\n" + script)
        os.chmod(self.path("openssl"), 0o755)
        return "OPENSSL=./openssl"

    def change(self, name, change):
        """Write what change() makes of a file's bytes; None removes it."""
        with open(self.path(name), "rb") as file:
            changed = change(file.read())
        if changed is None:
            os.remove(self.path(name))
        else:
            with open(self.path(name), "wb") as file:
                file.write(changed)

    def read(self, name):
        with open(self.path(name), encoding="utf-8") as file:
            return file.read()

    def index(self):
        """Return the CA's records, a list of columns for each certificate."""
        return [line.split("\t") for line in self.read("auth/test-ca/index.txt").splitlines()]

    def serials(self, name):
        """Return the serial numbers of all certificates that a name ever had, by the copies in the CA's home."""
        found = []
        home = glob.escape(self.path("auth/test-ca"))
        for copy in sorted(glob.glob(home + "/new_certs/*.pem") + glob.glob(home + "/revoked/*.pem")):
            text = run("openssl", "x509", "-in", copy, "-noout", "-serial", "-subject", "-nameopt", "sname,utf8,sep_multiline")[1]
            if f"CN={name}\n" in text:
                found.append(re.search("serial=(\\w+)", text)[1])
        return found

    def listing(self, folder=None):
        """Return the names of all files, in the test's clone or in another folder."""
        folder = folder or self.folder
        return sorted(os.path.relpath(os.path.join(where, name), folder) for where, _, names in os.walk(folder) for name in names)

    @staticmethod
    def gone(group):
        """Tell whether a process group is empty, apart from zombies."""
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        states = []
        for stat in glob.glob("/proc/[0-9]*/stat"):
            with contextlib.suppress(OSError), open(stat) as file:
                state, _, its_group = file.read().rpartition(")")[2].split()[:3]
                if int(its_group) == group:
                    states.append(state)
        return bool(states) and set(states) == {"Z"}
