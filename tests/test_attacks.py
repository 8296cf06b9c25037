"""What attackers found once, each held so that it stays mended."""

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

from support import (CA, CLIENT, PATIENCE, ROOT, SERVER, Process, Project, Server, TestCase, client, client_command,
                     connection, reset, run, temporary_folder)


class Certificates(TestCase):
    """Signed by our CA, and yet strange."""

    def sign(self, subject, oids=""):
        """Return the files of a certificate for client.key with a subject, given as -subj wants it."""
        folder = temporary_folder()
        config, request, certificate = (os.path.join(folder, name) for name in ("conf", "req", "crt"))
        with open(config, "w") as file:
            file.write(f"oid_section = oids\n[oids]\n{oids}\n[req]\ndistinguished_name = empty\n[empty]\n")
        for command in [["req", "-config", config, "-new", "-key", CLIENT[1], "-subj", subject, "-out", request],
                        ["x509", "-req", "-in", request, "-CA", CA, "-CAkey", "auth/test-ca/test-ca.key", "-set_serial", "9",
                         "-days", "1", "-out", certificate]]:
            status, _, errors = run("openssl", *command)
            self.assertEqual(status, 0, errors)
        return certificate, CLIENT[1]

    def test_object_identifier_of_4_kB(self):
        files = self.sign("/longoid=x/CN=example.com", "longoid = 1.2." + ".".join(["4294967295"] * 400))
        with Server(files=(CA, *files)) as server:
            status, output, errors = client(server.port)
            self.assertEqual((status, output), (1, ""), errors)
            self.assertOneLine(errors, f"client_try: 127.0.0.1:{server.port}: turned away: ")
        with Server() as server:
            client(server.port, files=(CA, *files))
            server.wait_for("turned away: ")

    def test_long_subject_keeps_its_end(self):
        files = self.sign("".join(f"/OU={'x' * 60}{number}" for number in range(5)) + "/CN=laptop7")
        with Server() as server:
            self.assertEqual(client(server.port, files=(CA, *files))[1], "42\n")
            line = server.wait_for(r"accepted \.\.\.x.*, CN=laptop7 \(serial 09, ").string
            self.assertLess(len(line), 400)


class Handshakes(TestCase):
    def test_costly_groups_are_refused(self):
        with Server() as server:
            for group in "ffdhe8192", "ffdhe4096":
                status, _, errors = run("openssl", "s_client", "-groups", group, "-connect", f"127.0.0.1:{server.port}", "-CAfile", CA,
                                        "-cert", CLIENT[0], "-key", CLIENT[1])
                if "-groups" in errors:  # as a command that it does not know
                    self.skipTest(f"this openssl does not offer {group}")
                server.wait_for("turned away: ")
            self.assertNotIn("accepted", server.log())

    def test_alerts_of_every_name_are_the_other_ends(self):
        names = {48: "unknown ca", 110: "unsupported extension", 111: "certificate unobtainable", 112: "unrecognized name",
                 113: "bad certificate status response", 114: "bad certificate hash value", 116: "certificate required", 199: ""}
        with socket.create_server(("127.0.0.1", 0)) as listener:
            def answer():
                for number in names:
                    with listener.accept()[0] as sock:
                        sock.recv(10000)
                        sock.sendall(struct.pack("!BHHBB", 21, 0x303, 2, 2, number))  # RFC 8446, 5.1 and 6
                        sock.recv(10000)
            thread = threading.Thread(target=answer, daemon=True)
            thread.start()
            for name in names.values():
                status, output, errors = client(listener.getsockname()[1])
                self.assertEqual((status, output), (1, ""))
                self.assertOneLine(errors, f": turned us away: {name}")
            thread.join(PATIENCE)

    def test_reset_before_the_server_looks(self):
        with Server() as server:
            for data in b"", b"x" * 1000:
                server.process.send_signal(signal.SIGSTOP)
                stranger = socket.create_connection(("127.0.0.1", server.port))
                stranger.sendall(data)
                reset(stranger)
                server.process.send_signal(signal.SIGCONT)
                server.wait_for(r"^127.0.0.1:\d+: \w")
                server.lines.clear()
            self.assertEqual(client(server.port)[1], "42\n")
            self.assertNotRegex(server.log(), "Traceback|wrapper")


class Signals(TestCase):
    def test_sigterm_in_the_first_instants(self):
        command = [sys.executable, os.path.join(ROOT, "server_try"), "--port", "0", CA, *SERVER]
        for number in range(30):
            with subprocess.Popen(command, cwd=Project.get(), stderr=subprocess.PIPE) as server:
                time.sleep(number * 0.005)
                server.terminate()
                said = server.stderr.read().decode()
                status = server.wait(PATIENCE)
            self.assertEqual(status, 0 if "listening" in said else -signal.SIGTERM)
            self.assertNotIn("Traceback", said)

    def test_no_thread_to_be_had(self):
        """One thread alone, as under a limit on tasks: clients take turns, and the stop is in order."""
        with open(os.path.join(ROOT, "server_try")) as file:
            text = file.read()
        start = "                        threading.Thread(target=self.work, daemon=True).start()"
        self.assertEqual(text.count(start), 1)
        script = os.path.join(temporary_folder(), "server_try")
        with open(script, "w") as file:
            file.write(text.replace(start, '                        raise RuntimeError("can\'t start new thread")'))
        with Server(script=script) as server:
            with connection(server.port) as tls:
                tls.sendall(b"1\n")
                self.assertEqual(tls.recv(10), b"2\n")
                second = Process(*client_command(server.port, "--timeout", str(PATIENCE)))
            with second:
                self.assertEqual((second.end(), second.process.stdout.read()), (0, b"42\n"), second.log())
            with connection(server.port) as tls:
                tls.sendall(b"1\n")
                self.assertEqual(tls.recv(10), b"2\n")
                self.assertEqual(server.stop(), 0)
                self.assertEqual(tls.recv(10), b"")
            self.assertNotIn("Traceback", server.log())
