"""Bad starts: one clear line that names the culprit, the right exit status, no traceback and no hang."""

import os
import socket
import subprocess
import sys
import time
import unittest

from support import CA, CLIENT, PATIENCE, ROOT, SERVER, Process, Project, Server, TestCase, client, client_command, run


class BadFiles(TestCase):
    """Every file, at each end."""

    def setUp(self):
        self.folder = Project.get()

    def write(self, name, content=b""):
        with open(os.path.join(self.folder, name), "wb") as file:
            file.write(content)
        return name

    def refused(self, files, *wanted):
        for script in "server_try", "client_try":
            with self.subTest(script, files=files):
                status, output, errors = run(sys.executable, os.path.join(ROOT, script), "--port", "1", *files)
                self.assertEqual((status, output), (1, ""), errors)
                self.assertOneLine(errors, script + ": ", *wanted)

    def test_no_good_at_all(self):
        cut = open(os.path.join(self.folder, CA), "rb")
        with cut:
            half = cut.read()[:-300]
        link = os.path.join(self.folder, "loop")
        if not os.path.islink(link):
            os.symlink("loop", link)
        for name, reason in [("missing", "No such file"), ("auth", "Is a directory"), ("loop", "Too many levels"),
                             (self.write("empty"), ""), (self.write("junk", os.urandom(999)), ""),
                             (self.write("text", b"what is this?\n"), ""), (self.write("half", half), "")]:
            self.refused((name, *SERVER), f": {name}: ", reason)
            self.refused((CA, name, SERVER[1]), f": {name}: ", reason)
            self.refused((CA, SERVER[0], name), f": {name}: ", reason or "no key in it, or a wrong passphrase")

    @unittest.skipIf(os.geteuid() == 0, "root may read anything")
    def test_unreadable(self):
        os.chmod(os.path.join(self.folder, self.write("secret")), 0)
        self.refused(("secret", *SERVER), ": secret: Permission denied")
        self.refused((CA, "secret", SERVER[1]), ": secret: Permission denied")
        self.refused((CA, SERVER[0], "secret"), ": secret: Permission denied")

    def test_wrong_way_round(self):
        self.refused((CA, SERVER[1], SERVER[0]), SERVER[1] + ": ")
        self.refused((SERVER[0], CA, SERVER[1]), SERVER[0] + ": not a CA certificate")
        self.refused((SERVER[1], SERVER[0], CA), SERVER[1] + ": ")

    def test_key_of_another_certificate(self):
        self.refused((CA, SERVER[0], CLIENT[1]), f"{CLIENT[1]}: ", SERVER[0], "key values mismatch")

    def test_encrypted_key_and_no_terminal(self):
        run("openssl", "pkey", "-in", SERVER[1], "-aes128", "-passout", "pass:secret", "-out", "encrypted.key")
        for stdin in subprocess.DEVNULL, subprocess.PIPE:
            with Process(sys.executable, os.path.join(ROOT, "server_try"), "--port", "0", CA, SERVER[0], "encrypted.key",
                         start_new_session=True) as server:
                self.assertEqual(server.end(), 1)
                self.assertIn("encrypted.key: encrypted, and there is no terminal", server.log())
        status, _, errors = client(1, files=(CA, CLIENT[0], "encrypted.key"), start_new_session=True)
        self.assertEqual(status, 1)
        self.assertOneLine(errors, "encrypted.key: encrypted, and there is no terminal")

    def test_key_log_that_cannot_be_written(self):
        status, _, errors = client(1, env={**os.environ, "SSLKEYLOGFILE": "no/such/folder"})
        self.assertEqual(status, 1)
        self.assertOneLine(errors, "client_try: no/such/folder: No such file or directory")


class BadAddresses(TestCase):
    def server(self, *arguments):
        status, output, errors = run(sys.executable, os.path.join(ROOT, "server_try"), *arguments, CA, *SERVER)
        self.assertEqual((status, output), (1, ""), errors)
        return errors

    def test_port_taken(self):
        with Server() as server:
            self.assertOneLine(self.server("--port", str(server.port)),
                               f"server_try: cannot listen on 127.0.0.1:{server.port}: Address already in use")

    def test_hosts_that_are_none(self):
        for host in "no.such.host.invalid", "a" * 70 + ".example", "192.0.2.1", "", "::zz":
            with self.subTest(host):
                self.assertOneLine(self.server("--host", host, "--port", "0"), "cannot listen on ", host)
        for host in "no.such.host.invalid", "a" * 70 + ".example", "::zz":
            with self.subTest(host):
                status, output, errors = client(6420, "--host", host)
                self.assertEqual((status, output), (1, ""))
                self.assertOneLine(errors, "client_try: ", host)

    def test_server_names_that_are_none(self):
        with Server() as server:
            for name in "", ".example.com", "a" * 70 + ".com":
                with self.subTest(name):
                    status, output, errors = client(server.port, "--server-name", name)
                    self.assertNotEqual(status, 0)
                    self.assertEqual(output, "")
                    self.assertNotIn("Traceback", errors)
                    self.assertIn("--server-name", errors)

    def test_nobody_listens(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        status, output, errors = client(port)
        self.assertEqual((status, output), (1, ""))
        self.assertOneLine(errors, f"client_try: 127.0.0.1:{port}: Connection refused")

    def test_somebody_listens_who_says_nothing(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            begun = time.monotonic()
            status, output, errors = client(listener.getsockname()[1], "--timeout", "1")
            self.assertEqual((status, output), (1, ""))
            self.assertOneLine(errors, "no answer within 1 s")
            self.assertGreater(time.monotonic() - begun, 1)
            self.assertLess(time.monotonic() - begun, PATIENCE / 2)

    def test_somebody_else_listens(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            with Process(*client_command(listener.getsockname()[1])) as process:
                other, _ = listener.accept()
                with other:
                    other.sendall(b"220 mail.example.com ESMTP\r\n")
                    self.assertEqual(process.end(), 1)
                    self.assertIn("wrong version number", process.log())


class Usage(TestCase):
    def test_is_told_with_status_2(self):
        for arguments in [[], ["a", "b"], ["a", "b", "c", "d"], ["--port", "65536", "a"], ["--port", "-1", "a"],
                          ["--port", "x", "a"], ["--timeout", "0", "a"], ["--timeout", "nan", "a"], ["--timeout", "inf", "a"],
                          ["--timeout", "-1", "a"], ["--what", "a"]]:
            for script in "server_try", "client_try":
                self.check(script, arguments)
        for number in "", "x", "1_0", " 1", "٤", "1.0", "9" * 4096, "-", "\x1b[31m":
            self.check("client_try", ["-n", number, "a"])
        self.check("client_try", ["--port", "0", "a"])

    def check(self, script, arguments):
        with self.subTest(script, arguments=arguments):
            status, output, errors = run(sys.executable, os.path.join(ROOT, script), *arguments)
            self.assertEqual((status, output), (2, ""), errors)
            self.assertRegex(errors, rf"\Ausage: {script} [^\x1b]*\n{script}: error: [^\x1b]+\n\Z")

    def test_help(self):
        for script in "server_try", "client_try":
            status, output, errors = run(os.path.join(ROOT, script), "--help")
            self.assertEqual((status, errors), (0, ""))
            self.assertIn("CA [CERT KEY]", output)

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

    def test_standard_error_closed(self):
        with Server() as server:
            command = '"$0" "$@" 2>&-'
            self.assertEqual(run("sh", "-c", command, *client_command(server.port))[:2], (0, "42\n"))

    def test_nobody_reads_the_log_any_more(self):
        reader, writer = os.pipe()
        with subprocess.Popen([sys.executable, os.path.join(ROOT, "server_try"), "--port", "0", CA, *SERVER],
                              cwd=Project.get(), stderr=writer) as second:
            try:
                os.close(writer)
                with open(reader, "rb") as log:
                    port = int(log.readline().decode().rpartition(":")[2])
                for _ in range(3):
                    self.assertEqual(client(port)[1], "42\n")
            finally:
                second.terminate()
        self.assertEqual(second.returncode, 0)

    def test_standard_output_closed(self):
        with Server() as server:
            log = os.path.join(Project.get(), "closed.log")
            status, _, errors = run("sh", "-c", '"$0" "$@" >&-', *client_command(server.port), env={**os.environ, "SSLKEYLOGFILE": log})
            self.assertEqual((status, errors), (1, "client_try: standard output is closed\n"))
            self.assertFalse(os.path.exists(log))

    def test_key_log_that_nobody_reads(self):
        fifo = os.path.join(Project.get(), "fifo")
        os.mkfifo(fifo)
        status, _, errors = client(1, env={**os.environ, "SSLKEYLOGFILE": fifo})
        self.assertEqual(status, 1)
        self.assertOneLine(errors, fifo)

    def test_lowered_limit_of_digits(self):
        with Server(env={**os.environ, "PYTHONINTMAXSTRDIGITS": "640"}) as server:
            self.assertEqual(client(server.port, "-n", "8" * 4000)[:2], (0, "8" * 3999 + "9\n"))
