"""Bad starts: one clear line that names the culprit, the right exit status, no traceback and no hang."""

import contextlib
import fcntl
import os
import pty
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import termios
import threading
import time
import unittest

from support import (ALL, CA, CLIENT, CONNECTED, EXPIRED, LISTENING, NOT_YET_VALID, PATIENCE, PEER, ROOT, SECOND_CA, SERVER,
                     SHOWING, TRUSTING, VERIFY, WRONG_ROLE, Process, Project, Server, TestCase, at_terminal_command, client,
                     client_command, make, path_with, python, python_after, run, served, template, temporary_folder, tls_server,
                     wait_until)


NO_CA = "; wanted: CA certificates in PEM form"
NO_PAIR = "; wanted: a certificate and its key in PEM form"
UNREADABLE = "[a-z0-9 ]+"  # in the words of some version of OpenSSL
ENCRYPTED = "auth/server.crt and encrypted.key: the passphrase is wrong, or none was given" + NO_PAIR


class BadFiles(TestCase):
    """Every file, at one end or both: both load them with the same lines."""

    def setUp(self):
        self.folder = Project.get()

    def write(self, name, content=b""):
        with open(os.path.join(self.folder, name), "wb") as file:
            file.write(content)
        return name

    def refused(self, files, says, scripts=("server_try", "client_try")):
        for script in scripts:
            with self.subTest(script, files=files):
                status, output, errors = run(*python(script, "--port", "1", *files))
                self.assertEqual((status, output), (1, ""), errors)
                self.assertLine(errors, f"{script}: {says}\n")

    def test_no_good_at_all(self):
        cut = open(os.path.join(self.folder, CA), "rb")
        with cut:
            half = cut.read()[:-300]
        link = os.path.join(self.folder, "loop")
        if not os.path.islink(link):
            os.symlink("loop", link)
        for name, reason in [("missing", "No such file or directory"), ("auth", "Is a directory"),
                             ("loop", "Too many levels of symbolic links|Symbolic link loop"),
                             (self.write("empty"), UNREADABLE), (self.write("junk", os.urandom(999)), UNREADABLE),
                             (self.write("half", half), UNREADABLE)]:
            self.refused((name, *SERVER), f"{name}: ({reason}){NO_CA}", ["server_try"])
            self.refused((CA, name, SERVER[1]), f"{name} and {SERVER[1]}: ({reason}){NO_PAIR}", ["client_try"])
            self.refused((CA, SERVER[0], name), f"{SERVER[0]} and {name}: ({reason}){NO_PAIR}", ["server_try"])

    @unittest.skipIf(os.geteuid() == 0, "root may read anything")
    def test_unreadable(self):
        os.chmod(os.path.join(self.folder, self.write("secret")), 0)
        self.refused(("secret", *SERVER), "secret: Permission denied" + NO_CA)
        self.refused((CA, "secret", SERVER[1]), "secret and auth/server.key: Permission denied" + NO_PAIR)

    def test_wrong_way_round(self):
        self.refused((CA, SERVER[1], SERVER[0]), f"{SERVER[1]} and {SERVER[0]}: {UNREADABLE}{NO_PAIR}", ["client_try"])
        self.refused((SERVER[0], CA, SERVER[1]), f"{SERVER[0]}: not a CA certificate, or not only that{NO_CA}")
        self.refused((SERVER[1], SERVER[0], CA), f"{SERVER[1]}: {UNREADABLE}{NO_CA}", ["server_try"])

    def test_key_of_another_certificate(self):
        self.refused((CA, SERVER[0], CLIENT[1]), f"{SERVER[0]} and {CLIENT[1]}: the key does not belong to the certificate{NO_PAIR}")
        another = os.path.join(self.folder, "rsa.key")  # the certificate has a key of another type
        self.assertEqual(run("openssl", "genrsa", "-out", another, "2048")[0], 0)
        self.refused((CA, SERVER[0], another), f"{SERVER[0]} and {another}: the key does not belong to the certificate{NO_PAIR}")

    def test_der_where_pem_is_wanted(self):
        self.assertEqual(run("openssl", "x509", "-in", CA, "-outform", "DER", "-out", "der")[0], 0)
        self.refused(("der", *SERVER), f"der: {UNREADABLE}{NO_CA}")

    def test_a_crl_is_no_ca(self):
        folder = shutil.copytree(template(ALL), os.path.join(temporary_folder(), "project"))
        make(folder, "crl")
        os.rename(os.path.join(folder, CA[:-4] + "crl"), os.path.join(self.folder, "a.crl"))
        self.refused(("a.crl", *SERVER), "a.crl: not a CA certificate, or not only that" + NO_CA)
        with open(os.path.join(self.folder, "both"), "w") as both:  # a list there would not be looked at
            for file in os.path.join(folder, CA), os.path.join(self.folder, "a.crl"):
                with open(file) as part:
                    both.write(part.read())
        self.refused(("both", *SERVER), "both: not a CA certificate, or not only that" + NO_CA)
        self.refused(("--crl", CA, CA, *SERVER), rf"{CA}: not a CRL, or not only that; wanted: a list of revoked certificates \(CRL\) in PEM form")

    def test_a_ca_certificate_that_python_cannot_decode(self):
        self.write("long.cnf", b"oid_section = oids\n[oids]\nlong = 1.2." + b".".join([b"4294967295"] * 400) +
                   b"\n[req]\ndistinguished_name = none\n[none]\n[ca]\nbasicConstraints = CA:TRUE\n")
        status, _, errors = run("openssl", "req", "-x509", "-new", "-config", "long.cnf", "-extensions", "ca", "-key", SERVER[1],
                                "-subj", "/long=x/CN=example.com", "-out", "long.crt")
        self.assertEqual(status, 0, errors)
        self.refused(("long.crt", *SERVER), "long.crt: unreadable" + NO_CA)

    def test_an_openssl_configuration_that_leaves_nothing(self):
        """Properties that no provider has, as where FIPS is asked for and is not installed."""
        self.write("fips.cnf", b"openssl_conf = init\n[init]\nalg_section = algs\n[algs]\ndefault_properties = fips=yes\n")
        if ssl.OPENSSL_VERSION_INFO < (3,):
            self.skipTest("this OpenSSL has no properties")
        for script in "server_try", "client_try":
            status, _, errors = run(*python(script), "--port", "1", CA, *SERVER,
                                    env={**os.environ, "OPENSSL_CONF": "fips.cnf"})
            self.assertEqual(status, 1)
            self.assertLine(errors, f"{script}: {re.escape(ssl.OPENSSL_VERSION)}, fips.cnf: {UNREADABLE}; wanted: TLS 1.3\n")

    def test_an_openssl_configuration_that_knows_no_tls_1_3(self):
        self.write("old.cnf", b"openssl_conf = i\n[i]\nssl_conf = s\n[s]\nsystem_default = d\n[d]\nMaxProtocol = TLSv1.2\n")
        environment = {**os.environ, "OPENSSL_CONF": os.path.join(self.folder, "old.cnf")}
        with Server(env=environment) as server:
            self.assertEqual(client(server.port, env=environment)[:2], (0, "42\n"))

    def encrypted(self):
        key = "encrypted.key"
        run("openssl", "pkey", "-in", SERVER[1], "-aes128", "-passout", "pass:secret", "-out", key)
        return (CA, SERVER[0], key)

    def test_encrypted_key_and_no_terminal(self):
        files = self.encrypted()
        for script in "server_try", "client_try":
            status, _, errors = run(*python(script, "--port", "1", *files), start_new_session=True)
            self.assertEqual(status, 1)
            self.assertLine(errors.splitlines()[-1], f"{script}: {ENCRYPTED}")
            self.assertNotIn("Traceback", errors)

    def at_a_terminal(self, answer):
        """Start the server with an encrypted key at a terminal of its own, and type an answer; return it and the terminal."""
        terminal, other_end = pty.openpty()
        server = subprocess.Popen(at_terminal_command("--port", "0", *self.encrypted()), cwd=self.folder, stdin=other_end,
                                  stderr=subprocess.PIPE)
        os.close(other_end)
        for end in server.kill, server.wait, server.stderr.close, lambda: os.close(terminal):
            self.addCleanup(end)
        self._cleanups.reverse()
        self.answer(terminal, answer)
        return server, terminal

    def answer(self, terminal, text):
        """Wait until OpenSSL asks for the passphrase, and type it."""
        shown = b""
        while b"Enter PEM pass phrase:" not in shown:
            self.assertTrue(select.select([terminal], [], [], PATIENCE)[0], shown)
            shown += os.read(terminal, 1000)
        os.write(terminal, text)

    def test_passphrase_is_asked_for_at_the_terminal_at_the_start_and_at_a_reload(self):
        server, terminal = self.at_a_terminal(b"secret\n")
        for line in TRUSTING, SHOWING, LISTENING:
            self.assertLine(server.stderr.readline().decode(), line + "\n")
        server.send_signal(signal.SIGHUP)
        self.answer(terminal, b"secret\n")
        for line in TRUSTING, SHOWING, "reloaded":
            self.assertLine(server.stderr.readline().decode(), line + "\n")
        server.terminate()
        self.assertEqual(server.wait(PATIENCE), 0)

    def test_passphrase_that_is_wrong_or_not_given(self):
        for answer in b"wrong\n", b"\x04", b"\x03":
            server, terminal = self.at_a_terminal(answer)

            def has_ended():
                os.write(terminal, answer)  # OpenSSL 3 asks twice
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(0.2)
                return server.poll() is not None
            wait_until(has_ended)
            self.assertIn(server.wait(0), (1, 130) if answer == b"\x03" else (1,))
            if server.returncode == 1:
                self.assertLine(server.stderr.read().decode().splitlines()[-1], f"server_try: {ENCRYPTED}")

    def test_file_through_a_pipe(self):
        if not os.path.isdir("/dev/fd"):
            self.skipTest("no /dev/fd here")
        command = 'cat "$1" | "$0" "$2" --port 1 /dev/fd/0 auth/client.crt auth/client.key'
        for ca, says in (CA, "127.0.0.1:1: Connection refused"), (CLIENT[1], f"/dev/fd/0: {UNREADABLE}{NO_CA}"):
            status, _, errors = run("sh", "-c", command, sys.executable, ca, os.path.join(ROOT, "client_try"))
            self.assertEqual(status, 1)
            self.assertLine(errors, f"client_try: {says}\n")

    def test_key_log_on_a_full_disk(self):
        if not os.path.exists("/dev/full"):
            self.skipTest("no /dev/full here")
        environment, full = {**os.environ, "SSLKEYLOGFILE": "/dev/full"}, "/dev/full: No space left on device; wanted: a file to write to"
        status, _, errors = run(*python("server_try"), CA, *SERVER, env=environment)
        self.assertEqual((status, errors), (1, f"server_try: {full}\n"))
        self.assertEqual(client(1, env=environment), (1, "", f"client_try: {full}\n"))

    def test_key_log_that_gets_full_meanwhile(self):
        path = os.path.join(temporary_folder(), "keys")
        with Server(env={**os.environ, "SSLKEYLOGFILE": path}, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))) as server:
            for _ in range(9):
                client(server.port)
            server.wait_for(f"{PEER}(answered [01], )?{path}: File too large")
            self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)

    def test_key_log_that_cannot_be_written(self):
        status, _, errors = client(1, env={**os.environ, "SSLKEYLOGFILE": "no/such/folder"})
        self.assertEqual(status, 1)
        self.assertEqual(errors, "client_try: no/such/folder: No such file or directory; wanted: a file to write to\n")


class Check(TestCase):
    def test_it_says_why_clients_would_not_take_its_certificate(self):
        def check(says, *arguments):
            status, output, errors = run(*python("server_try", "--check", *arguments))
            self.assertEqual((status, output), (1, ""), errors)
            self.assertLine(errors, f"({TRUSTING}\n)+trial handshake with {says}\n")
        for name, reason in [("expired-server", EXPIRED), ("future-server", NOT_YET_VALID), ("alt-server", SECOND_CA[len(VERIFY):])]:
            check(f"auth/{name}.crt failed: {VERIFY}{reason}", CA, f"auth/{name}.crt", SERVER[1])
        check(f"auth/client.crt failed: {VERIFY}{WRONG_ROLE}", CA, *CLIENT)
        check("no certificate failed: turned away: [a-z ]+", CA)
        folder = shutil.copytree(template(ALL), os.path.join(temporary_folder(), "project"))
        with open(os.path.join(folder, "auth/test-ca/crlnumber"), "w") as file:
            file.write("01\n")
        name = os.path.join(folder, "ca.crl")
        self.assertEqual(run("openssl", "ca", "-config", "auth/test-ca.conf", "-cert", CA, "-keyfile", CA[:-4] + "key", "-gencrl", "-crlsec", "1",
                             "-out", name, folder=folder)[0], 0)
        wait_until(lambda: run("openssl", "verify", "-crl_check", "-CRLfile", name, "-CAfile", CA, CLIENT[0])[0] != 0)
        check(rf"auth/server.crt failed: {VERIFY}CRL has expired \({re.escape(name)}\)", "--crl", name, CA, *SERVER)
        with Server(files=(CA, "auth/expired-server.crt", SERVER[1])) as server:  # it serves all the same
            server.wait_for(f"trial handshake with auth/expired-server.crt failed: {VERIFY}{EXPIRED}")

    def test_it_loads_the_files_says_whom_it_trusts_and_ends(self):
        with Server() as server:  # the port is taken, as before a reload
            command = python("server_try", "--check", "--port", str(server.port))
            status, output, errors = run(*command, CA, *SERVER)
            self.assertEqual((status, output), (0, ""), errors)
            self.assertLine(errors, f"{TRUSTING}\n{SHOWING}\n")
            status, output, errors = run(*command, CA, SERVER[0], CLIENT[1])
            self.assertEqual((status, output), (1, ""))
            self.assertEqual(errors, f"server_try: auth/server.crt and auth/client.key: the key does not belong to the certificate{NO_PAIR}\n")


class BadAddresses(TestCase):
    def server(self, *arguments):
        status, output, errors = run(*python("server_try", *arguments, CA, *SERVER))
        self.assertEqual((status, output), (1, ""), errors)
        return errors.splitlines(True)[-1]

    def test_port_taken(self):
        with Server() as server:
            self.assertEqual(self.server("--port", str(server.port)),
                             f"server_try: cannot listen on 127.0.0.1:{server.port}: Address already in use\n")

    def test_an_asterisk_is_refused_with_what_to_say_instead(self):
        status, _, errors = run(*python("server_try", "--host", "*", CA))
        self.assertEqual(status, 2)
        self.assertIn("every address is --host 0.0.0.0, or ::\n", errors)

    def test_an_address_without_its_zone(self):
        """Which the kernel calls an invalid argument; nobody has asked for a passphrase."""
        self.assertLine(self.server("--host", "fe80::1", "--port", "0"),
                        r"server_try: cannot listen on \[fe80::1]:0: (Invalid argument|Cannot assign requested address|Address family .*)\n")

    def test_every_address_without_ipv6(self):
        status, _, errors = run(*python_after("import socket; socket.has_dualstack_ipv6 = lambda: False", "server_try", "--host", "::", CA, *SERVER))
        self.assertEqual(status, 1)
        self.assertEqual(errors.splitlines()[-1], "server_try: cannot listen on [::]:6420: no IPv6 here; for every IPv4 address use --host 0.0.0.0")

    def test_hosts_that_are_none(self):
        for host in "no.such.host.invalid", "a" * 70 + ".example", "192.0.2.1", "::zz":
            with self.subTest(host):
                self.assertLine(self.server("--host", host, "--port", "0"),
                                rf"server_try: cannot listen on \[?{host}]?:0: .+\n")
        for host in "no.such.host.invalid", "a" * 70 + ".example", "::zz":
            with self.subTest(host):
                status, output, errors = client(6420, "--host", host, "--server-name", "example.com")
                self.assertEqual((status, output), (1, ""))
                self.assertLine(errors, rf"client_try: \[?{host}]?:6420: .+\n")

    def test_server_names_that_are_none(self):
        """They are the client's own mistake, and told before it connects to anybody."""
        for name in ".example.com", "a" * 70 + ".com", ".", "%x", ".".join(["a" * 60] * 5):
            with self.subTest(name):
                status, output, errors = client(1, "--server-name", name)
                self.assertEqual((status, output), (1, ""))
                self.assertLine(errors, rf"client_try: server name '{name.partition('%')[0].rstrip('.')}': .+; wanted: the name in the server's certificate\n")

    def test_nobody_listens(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        status, output, errors = client(port)
        self.assertEqual((status, output), (1, ""))
        self.assertEqual(errors, f"client_try: 127.0.0.1:{port}: Connection refused\n")

    def test_somebody_listens_who_says_nothing(self):
        """Whatever signals the client's parent has blocked."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            begun = time.monotonic()
            status, output, errors = client(listener.getsockname()[1], "--timeout", "1",
                                            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGUSR1}))
            self.assertEqual((status, output), (1, ""))
            self.assertLine(errors, f"client_try: {PEER}no answer within 1 s\n")
            self.assertGreater(time.monotonic() - begun, 1)
            self.assertLess(time.monotonic() - begun, PATIENCE / 2)

    def test_a_name_server_that_says_nothing(self):
        """In a mount namespace of its own, where one name server is asked, and a socket is there that nobody reads."""
        folder = temporary_folder()
        for name, text in ("resolv.conf", "nameserver 127.0.0.53\n"), ("nsswitch.conf", "hosts: dns\n"):
            with open(os.path.join(folder, name), "w") as file:
                file.write(text)
        steps = "ip link set lo up; for name in resolv.conf nsswitch.conf; do mount --bind $1/$name /etc/$name || exit 77; done; shift; exec \"$@\""
        if not shutil.which("unshare") or not shutil.which("ip") or run("unshare", "--mount", "--net", "sh", "-c", steps, "sh", folder, "true")[0]:
            self.skipTest("no namespaces can be made here")
        silent = "import socket; listener = socket.socket(type=socket.SOCK_DGRAM); listener.bind(('127.0.0.53', 53))"
        command = ["unshare", "--mount", "--net", "sh", "-c", steps, "sh", folder, *python_after(silent, "client_try", "--host", "db1.internal")]
        begun = time.monotonic()
        self.assertEqual(run(*command, "--timeout", "1", CA), (1, "", "client_try: db1.internal:6420: no answer within 1 s\n"))
        self.assertLess(time.monotonic() - begun, 9)  # the system itself waits 10 s at least: it asks twice
        for number, status in (signal.SIGINT, 130), (signal.SIGTERM, 143):
            with Process(*command, "--timeout", str(PATIENCE), CA) as process:
                wait_until(lambda: self.looks_up(process.process.pid))
                process.process.send_signal(number)
                self.assertEqual(process.end(4), status)

    @staticmethod
    def looks_up(pid):
        """Tell whether a process has a second thread, which looks the name up."""
        with contextlib.suppress(OSError):
            return len(os.listdir(f"/proc/{pid}/task")) > 1

    def test_a_server_that_sends_tickets_without_end(self):
        context = tls_server()
        context.num_tickets = 2 ** 31 - 1
        with socket.create_server(("127.0.0.1", 0)) as listener:
            def flood():
                with contextlib.suppress(OSError):
                    while True:
                        with contextlib.suppress(ssl.SSLError, ConnectionError), listener.accept()[0] as raw:
                            context.wrap_socket(raw, server_side=True)
            threading.Thread(target=flood, daemon=True).start()
            port = listener.getsockname()[1]
            # At a normal exit OpenSSL cleans up, which may crash a thread that is still in it.
            command = python_after("import atexit, os; atexit.register(os.abort)", "client_try", "--port", str(port), CA, *CLIENT, "--timeout")
            self.assertRefused(run(*command, "1"), "no answer within 1 s")
            for number, status in (signal.SIGINT, 130), (signal.SIGTERM, 143):
                with Process(*command, str(PATIENCE)) as process:
                    process.wait_for("connected to .*")
                    process.process.send_signal(number)
                    self.assertEqual(process.end(PATIENCE / 2), status)

    def test_somebody_else_listens(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            with Process(*client_command(listener.getsockname()[1])) as process:
                other, _ = listener.accept()
                with other:
                    other.sendall(b"220 mail.example.com ESMTP\r\n")
                    self.assertEqual(process.end(), 1)
                    self.assertLine(process.log(), f"client_try: {PEER}turned away: (wrong version number)\n")


class Names(TestCase):
    """What is looked up is not quite what is verified."""

    def test_final_dot(self):
        with Server("--host", "localhost") as server:
            self.assertEqual(client(server.port, "--host", "127.0.0.1", "--server-name", "localhost.")[:2], (0, "42\n"))
            status, output, errors = client(server.port, "--host", "localhost.")
            if "localhost.:" in errors and status and "turned" not in errors:
                self.skipTest("localhost. is no name here: " + errors)
            self.assertEqual((status, output), (0, "42\n"), errors)

    def test_link_local_address_with_its_zone(self):
        """In a network namespace of its own, with an interface that has such an address."""
        steps = """ip link set lo up && ip link add zone type veth peer name other && ip link set zone up && ip link set other up || exit 77
            while ip -6 address show dev zone | grep -q tentative; do sleep 0.1; done
            address=$(ip -6 address show dev zone | sed -n 's/.*inet6 \\(fe80[^/]*\\).*/\\1/p')%zone
            ip address show dev zone | grep -q fe80 || exit 77
            "$0" "$1" --port 6420 --host $address "$3" "$4" "$5" 2> zone.log & server=$!
            until grep -q trusting zone.log || ! kill -0 $server; do sleep 0.1; done
            "$0" "$2" --host $address --server-name example.com "$3" "$4" "$5"; "$0" "$2" --host $address "$3" "$4" "$5"
            kill $server; cat zone.log >&2"""
        scripts = [os.path.join(ROOT, script) for script in ("server_try", "client_try")]
        if not shutil.which("unshare") or not shutil.which("ip"):
            self.skipTest("needs unshare and ip")
        # One certificate cannot be a server's and a client's: the refusals say which name was looked at.
        status, output, errors = run("unshare", "--net", "sh", "-c", steps, sys.executable, *scripts, CA, *SERVER)
        if status in (1, 77):
            self.skipTest("no network namespace can be made here: " + errors)
        self.assertRegex(errors, r"(?m)^listening on \[fe80::[\da-f:]+\]:6420$")
        self.assertRegex(errors, f"(?m)^{CONNECTED}$" % r"\[fe80::[\da-f:]+%zone]:6420")
        self.assertRegex(errors, rf"(?m)^client_try: \[fe80::[\da-f:]+%zone]:6420: {VERIFY}IP address mismatch, "
                         r"certificate is not valid for 'fe80::[\da-f:]+'\.$")


class Usage(TestCase):
    def test_is_told_with_status_2(self):
        for arguments in [], ["a", "b"], ["a", "b", "c", "d"]:
            for script in "server_try", "client_try":
                said = self.check(script, arguments)
                self.assertEqual("error: CERT and KEY go together: give CA alone, or CA CERT KEY\n" in said, arguments != [])
        self.check("server_try", ["--port", "x", "a"])
        self.check("client_try", ["--what", "a"])
        for option in "--host", "--crl", "--server-name":
            for script in ("client_try",) if option == "--server-name" else ("server_try", "client_try"):
                self.assertIn("take a ", self.check(script, [option, "", "a"]))
        for option, value, *scripts in [("--port", "65536", "server_try", "client_try"), ("--port", "-1", "server_try"),
                                        ("--timeout", "nan", "server_try", "client_try"), ("--timeout", "-1", "server_try"),
                                        ("--timeout", "0", "client_try"), ("--timeout", "inf", "server_try", "client_try"),
                                        ("--max-clients", "0", "server_try"), ("--max-clients", "-5", "server_try")]:
            for script in scripts:
                self.assertIn(f"error: {option} must be ", self.check(script, [option, value, "a"]))
        for number in "", "x", "1_0", " 1", "٤", "1.0", "9" * 4096, "-", "\x1b[31m":
            self.check("client_try", ["-n", number, "a"])
        self.check("client_try", ["--port", "0", "a"])

    def test_a_value_of_two_dashes(self):
        """argparse takes it for none until 3.13."""
        for script, *options in ("server_try", "host", "crl", "port"), ("client_try", "host", "crl", "server-name", "timeout"):
            for option in options:
                status, _, errors = run(*python(script, f"--{option}=--", CA))
                self.assertIn(status, (1, 2))
                self.assertNotIn("Traceback", errors)
        self.check("client_try", ["--number=--", "a"])

    def test_a_python_that_knows_no_tls_1_3(self):
        """This one as if its ssl module were linked with an old LibreSSL."""
        old = """
import ssl
def without_tls_1_3(*_):
    raise ValueError("Unsupported protocol version 0x304")
ssl.OPENSSL_VERSION = "LibreSSL 2.8.3"
ssl.SSLContext.minimum_version = ssl.SSLContext.maximum_version = property(None, without_tls_1_3)
"""
        for script in "server_try", "client_try":
            self.assertEqual(run(*python_after(old, script, CA)),
                             (1, "", f"{script}: LibreSSL 2.8.3, : Unsupported protocol version 0x304; wanted: TLS 1.3\n"))

    def check(self, script, arguments):
        with self.subTest(script, arguments=arguments):
            status, output, errors = run(*python(script, *arguments))
            self.assertEqual((status, output), (2, ""), errors)
            self.assertRegex(errors, rf"\Ausage: {script} [^\x1b]*\n{script}: error: [^\x1b]+\n\Z")
        return errors

    def test_help(self):
        for script, defaults in ("server_try", ("127.0.0.1", "6420", "1000", "10")), ("client_try", ("127.0.0.1", "HOST, else example.com", "6420", "10", "41")):
            status, output, errors = run(os.path.join(ROOT, script), "--help", env={**os.environ, "PATH": path_with()})
            self.assertEqual((status, errors), (0, ""))
            self.assertIn("CA [CERT KEY]", output)
            for default in defaults:
                self.assertIn(f"(default: {default}", " ".join(output.split()))

    def test_files_may_stand_anywhere(self):
        with Server("--timeout", "9", files=(CA, "--host", "127.0.0.1", *SERVER)) as server:
            self.assertEqual(client(server.port, "-n", "1", files=(CA, *CLIENT, "-n", "2"))[:2], (0, "2\n3\n"))


class Outputs(TestCase):
    """Where what it has to say cannot be written."""

    def test_full_disk(self):
        if not os.path.exists("/dev/full"):
            self.skipTest("no /dev/full here")
        with Server() as server, open("/dev/full", "wb") as full:
            done = subprocess.run(client_command(server.port), cwd=Project.get(), stdout=full, stderr=subprocess.PIPE,
                                  timeout=PATIENCE)
            self.assertEqual(done.returncode, 1)
            self.assertEqual(done.stderr.decode().splitlines()[-1],
                             "client_try: cannot write to standard output: No space left on device")
            self.assertNotIn(b"Traceback", done.stderr)

    def test_whoever_reads_the_replies_late_gets_them_all(self):
        """They are printed when all has come, whatever becomes of the time limit then; what is read exceeds the buffer of a pipe."""
        with Server() as server, Process(*client_command(server.port, "--timeout", str(PATIENCE), *["-n", "1" * 4000] * 40)) as process:
            server.wait_for(PEER + "answered 40, done")
            wait_until(lambda: struct.unpack("i", fcntl.ioctl(process.process.stdout, termios.FIONREAD, bytes(4)))[0] >= 16384)
            self.assertEqual(process.process.stdout.read(), b"".join([b"1" * 3999 + b"2\n"] * 40))
            self.assertEqual(process.end(), 0)

    def test_standard_output_closed(self):
        with Server() as server:
            command = '"$0" "$@" >&-'
            self.assertEqual(run("sh", "-c", command, *client_command(server.port)),
                             (1, "", "client_try: standard output is closed\n"))

    def test_python_has_nothing_to_warn_of(self):
        strict = [sys.executable, "-X", "dev", "-W", "error"]
        with Process(*strict, os.path.join(ROOT, "server_try"), "--port", "0", CA, *SERVER) as server:
            port = server.wait_for(LISTENING)[1]
            for files, lines in ((CA, *CLIENT), 2), ((CA,), 3), (("auth/alt-ca/alt-ca.cert", *CLIENT), 1):
                command = client_command(port, files=files)[1:]
                status, _, errors = run(*strict, *command)
                self.assertEqual(len(errors.splitlines()), lines, errors)
            self.assertEqual(len(run(*strict, *client_command(1)[1:])[2].splitlines()), 1)
            server.process.terminate()
            self.assertEqual(server.end(), 0)
            self.assertNotRegex(server.log(), "Warning|Traceback")

    def test_standard_error_closed(self):
        with Server() as server:
            command = '"$0" "$@" 2>&-'
            self.assertEqual(run("sh", "-c", command, *client_command(server.port))[:2], (0, "42\n"))

    def test_nobody_reads_the_log_any_more(self):
        reader, writer = os.pipe()
        with subprocess.Popen(python("server_try", "--port", "0", CA, *SERVER),
                              cwd=Project.get(), stderr=writer) as second:
            try:
                os.close(writer)
                with open(reader, "rb") as log:
                    port = next(int(line.rpartition(b":")[2]) for line in log if line.startswith(b"listening"))
                for _ in range(3):
                    self.assertEqual(served(port), b"42\n")
            finally:
                second.terminate()
        self.assertEqual(second.returncode, 0)
