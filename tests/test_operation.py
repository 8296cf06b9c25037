"""Stopping, reloading, expiry and revocation."""

import contextlib
import os
import re
import shutil
import signal
import socket
import threading
import time

from support import (ACCEPTED, ALL, CA, CLIENT, EXAMPLE, EXPIRED, NOT_YET_VALID, PATIENCE, PEER, SERVER, SHOWING, TRUSTING, VERIFY, Server,
                     TestCase, client, connection, copy_project, fill, make, python, receive_all, run, served,
                     shortened, stuck_connection, template, temporary_folder, unread, wait_until)

CRL = "auth/test-ca/test-ca.crl"
LAPTOP = ("auth/clients/laptop7.crt", "auth/clients/laptop7.key")


class Stopping(TestCase):
    def test_what_has_arrived_is_answered_and_all_are_closed_properly(self):
        batch = b"".join(b"%d\n" % number for number in range(2000))
        for number in signal.SIGTERM, signal.SIGINT:
            with Server() as server, contextlib.ExitStack() as stack:
                idle = [stack.enter_context(connection(server.port)) for _ in range(5)]
                strangers = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(5)]
                busy = stack.enter_context(connection(server.port))
                half = stack.enter_context(connection(server.port))
                with server.halted():
                    busy.sendall(batch)
                    half.sendall(b"1")
                    server.process.send_signal(number)
                self.assertEqual(len(receive_all(busy).splitlines()), 2000)
                self.assertEqual(receive_all(half), b"error: no newline at the end\n")
                for one in idle:
                    self.assertEqual(one.recv(10), b"")
                    one.unwrap().close()  # needs the server's close_notify
                for one in strangers:
                    with contextlib.suppress(ConnectionError):
                        self.assertEqual(one.recv(10), b"")
                self.assertEqual(server.end(), 0)
                self.assertEqual(server.lines[-2], "stopped")
                self.assertEqual(len(re.findall(f"(?m)^{PEER}not accepted before the stop$", server.log())), 5)
                self.assertNotRegex(server.log(), "Traceback|internal error")
                socket.create_server(("127.0.0.1", server.port)).close()  # it can be bound again

    def test_in_time_whatever_hangs_on(self):
        with Server() as server, stuck_connection(server.port), connection(server.port) as drip:
            drip.sendall(b"1")
            begun = time.monotonic()
            self.assertEqual(server.stop(), 0)
            self.assertLess(time.monotonic() - begun, PATIENCE / 2)

    def test_second_ctrl_c_ends_it_there_and_then(self):
        with Server(script=shortened("server_try", STOP_SECONDS=3600)) as server, stuck_connection(server.port):
            server.process.send_signal(signal.SIGINT)
            server.wait_for("stopping, connections: 1")

            def port_is_free():
                with contextlib.suppress(ConnectionRefusedError):
                    socket.create_connection(("127.0.0.1", server.port)).close()
                    return False
                return True
            wait_until(port_is_free)
            server.process.send_signal(signal.SIGINT)
            self.assertEqual(server.end(), 0)
            self.assertNotIn("stopped", server.lines)

    def test_it_waits_for_nobody_who_has_left(self):
        """As one client has a place at a time, the server has let go of a client when the next is served."""
        with Server("--max-clients", "1", script=shortened("server_try", STOP_SECONDS=3600)) as server:
            for _ in range(3):
                self.assertEqual(client(server.port)[:2], (0, "42\n"))
            self.assertEqual(server.stop(), 0)
            server.wait_for("stopping, connections: [01]")

    def test_in_time_even_where_nobody_reads_the_log(self):
        with unread(python(shortened("server_try", STOP_SECONDS=1), "--port", "0", CA, *SERVER)) as (process, port, _, writer):
            fill(writer)
            for _ in range(100):
                socket.create_connection(("127.0.0.1", port)).close()
            process.terminate()
            self.assertEqual(process.wait(PATIENCE), 0)


class Changing(TestCase):
    """Files that change under a running server."""

    def setUp(self):
        self.folder = copy_project(os.path.join(temporary_folder(), "clone"))
        shutil.rmtree(os.path.join(self.folder, "auth"))
        shutil.copytree(os.path.join(template(ALL), "auth"), os.path.join(self.folder, "auth"))

    def path(self, name):
        return os.path.join(self.folder, name)

    def serve(self, *arguments, **options):
        server = Server(*arguments, folder=self.folder, **options)
        self.addCleanup(server.__exit__)
        return server

    def client(self, server, *arguments, **options):
        return client(server.port, *arguments, folder=self.folder, **options)

    def reload(self, server, pattern):
        server.lines.clear()
        server.process.send_signal(signal.SIGHUP)
        return server.wait_for(pattern)

    def test_reload(self):
        server = self.serve()
        first = self.client(server)[2]
        with connection(server.port) as tls:
            make(self.folder, "renew")
            self.assertIn(first.splitlines()[0], self.client(server)[2])
            wait_until(lambda: server.log().count("answered 1, done") == 2)
            self.reload(server, "reloaded")
            self.assertLine(server.log(), f"{TRUSTING}\n{SHOWING}\nreloaded")
            status, output, errors = self.client(server)
            self.assertEqual(server.lines[1].split("(serial ")[1][:4], errors.split("(serial ")[1][:4])  # the new one
            self.assertEqual((status, output), (0, "42\n"))
            self.assertNotEqual(first.splitlines()[0], errors.splitlines()[0])
            tls.sendall(b"1\n")
            self.assertEqual(tls.recv(10), b"2\n")
        wanted = "; wanted: a certificate and its key in PEM form"
        for good, bad, says in [(SERVER[1], CLIENT[1], "auth/server.crt and auth/server.key: the key does not belong to the certificate" + wanted),
                                (SERVER[0], None, "auth/server.crt and auth/server.key: No such file or directory" + wanted),
                                (CA, SERVER[1], f"{CA}: (no certificate or crl found|unreadable); wanted: CA certificates in PEM form")]:
            os.rename(self.path(good), self.path("kept"))
            if bad:
                shutil.copy(self.path(bad), self.path(good))
            self.reload(server, "not reloaded, the old files stay in use: " + says)
            os.replace(self.path("kept"), self.path(good))
            self.assertEqual(served(server.port, folder=self.folder), b"42\n")
        self.reload(server, "reloaded")

    def test_no_connection_is_lost_to_reloads(self):
        server = self.serve()
        done = threading.Event()

        def reload_all_the_time():
            while not done.wait(0.02):
                server.process.send_signal(signal.SIGHUP)

        thread = threading.Thread(target=reload_all_the_time)
        thread.start()
        try:
            for _ in range(80):
                with connection(server.port) as tls:
                    tls.sendall(b"1\n")
                    self.assertEqual(tls.recv(10), b"2\n")
        finally:
            done.set()
            thread.join()
        self.assertEqual(server.stop(), 0)
        self.assertGreater(server.log().count("reloaded"), 5)
        self.assertNotIn("not reloaded", server.log())

    def test_many_reloads_at_once_and_then_a_stop(self):
        server = self.serve()
        for _ in range(3000):
            server.process.send_signal(signal.SIGHUP)
        self.assertEqual(server.stop(), 0)
        self.assertNotIn("Traceback", server.log())

    def test_files_that_change_while_they_are_loaded(self):
        server = self.serve()
        path = self.path(SERVER[0])
        with open(path, "rb") as file:
            good = file.read()
        for cut in range(0, len(good), 199):
            server.process.send_signal(signal.SIGHUP)
            os.remove(path)
            with open(path, "wb") as file:
                file.write(good[:cut])
            server.process.send_signal(signal.SIGHUP)
        with open(path, "wb") as file:
            file.write(good)
        self.assertEqual(served(server.port, folder=self.folder), b"42\n")
        self.assertEqual(server.stop(), 0)
        self.assertNotIn("Traceback", server.log())

    def test_strange_certificates(self):
        """Signed by our CA, and yet nothing that is in them is logged raw."""
        make(self.folder, "client-cert", "NAME=laptop7")
        subject = self.path("escape.req")
        status, _, errors = run("openssl", "req", "-config", "auth/test-ca.conf", "-new", "-key", LAPTOP[1], "-utf8",
                                "-subj", "/CN=\x1b[31mred\u202e", "-out", subject, folder=self.folder)
        self.assertEqual(status, 0, errors)
        subjects = EXAMPLE.replace("example.com", "laptop7") % "Client", r"CN=\\x1b\[31mred\\u202e"
        for options, extension, shown in [(["-set_serial", "0x7f" + "ff" * 200], "", ACCEPTED.replace(r"\w+", "7F{39}", 1) % subjects[0]),
                                          (["-in", subject, "-set_serial", "7"], "", ACCEPTED.replace(r"\w+", "07", 1) % subjects[1]),
                                          ([], "subjectAltName=DER:30:03:82:01:ff", PEER + "turned away: a certificate that cannot be decoded")]:
            with open(self.path("extensions"), "w") as file:
                file.write(extension)
            command = ["openssl", "x509", "-req", "-in", "auth/clients/laptop7.req", "-CA", CA, "-CAkey", "auth/test-ca/test-ca.key",
                       "-out", "strange.crt", "-days", "1", "-extfile", "extensions", *(options or ["-CAcreateserial"])]
            status, _, errors = run(*command, folder=self.folder)
            self.assertEqual(status, 0, errors)
            server = self.serve()
            self.client(server, files=(CA, "strange.crt", LAPTOP[1]))
            server.wait_for(shown)
            self.assertEqual(served(server.port, folder=self.folder), b"42\n")

        names = "30:10:82:0B:" + ":".join(f"{byte:02X}" for byte in b"example.com") + ":82:01:FF"
        with open(self.path("extensions"), "w") as file:
            file.write("subjectAltName=DER:" + names)
        self.assertEqual(run("openssl", "x509", "-req", "-in", "auth/server.req", "-CA", CA, "-CAkey", "auth/test-ca/test-ca.key", "-days", "1",
                             "-set_serial", "8", "-extfile", "extensions", "-out", "strange.crt", folder=self.folder)[0], 0)
        server = self.serve(files=(CA, "strange.crt", SERVER[1]))
        self.assertRefused(self.client(server), "turned away: a certificate that cannot be decoded")

    def test_expired_and_not_yet_valid_at_each_end(self):
        expired = ("auth/expired-server.crt", SERVER[1])
        server = self.serve(files=(CA, *expired))
        self.assertRefused(self.client(server), VERIFY + EXPIRED)
        server.wait_for(PEER + "turned us away: certificate expired")
        server = self.serve()
        self.assertRefused(self.client(server, files=(CA, "auth/expired-client.crt", CLIENT[1])), "turned us away: certificate expired")
        server.wait_for(PEER + VERIFY + EXPIRED)
        self.assertRefused(self.client(server, files=(CA, "auth/future-client.crt", CLIENT[1])), "turned us away: bad certificate")
        server.wait_for(PEER + VERIFY + NOT_YET_VALID)

    def test_revoked_client(self):
        make(self.folder, "client-cert", "NAME=laptop7")
        shutil.copy(self.path(LAPTOP[0]), self.path("auth/older.crt"))
        make(self.folder, "renew")
        server = self.serve("--crl", CRL)
        files = (CA, *LAPTOP)
        self.assertEqual(self.client(server, files=files)[:2], (0, "42\n"))
        for _ in range(2):
            make(self.folder, "revoke", "NAME=laptop7")
        self.assertEqual(self.client(server, files=files)[:2], (0, "42\n"))
        self.reload(server, "reloaded")
        for stolen in LAPTOP[0], "auth/older.crt":
            self.assertRefused(self.client(server, files=(CA, stolen, LAPTOP[1])), "turned us away: certificate revoked")
            server.wait_for(PEER + VERIFY + "certificate revoked")
            server.lines.clear()
        self.assertEqual(served(server.port, folder=self.folder), b"42\n")
        make(self.folder, "renew")
        self.assertEqual(self.client(server, files=files)[0], 1)
        make(self.folder, "client-cert", "NAME=laptop7")
        self.assertEqual(self.client(server, files=files)[:2], (0, "42\n"))

    def test_revoked_server(self):
        make(self.folder, "server-cert", "NAME=db1.internal")
        make(self.folder, "revoke", "NAME=db1.internal")
        server = self.serve(files=(CA, "auth/servers/db1.internal.crt", "auth/servers/db1.internal.key"))
        options = ("--server-name", "db1.internal")
        self.assertEqual(self.client(server, *options)[:2], (0, "42\n"))
        self.assertRefused(self.client(server, "--crl", CRL, *options), VERIFY + "certificate revoked")
        server.wait_for(PEER + "turned us away: certificate revoked")

    def test_crl_that_is_no_good_lets_nobody_in(self):
        with open(self.path("junk"), "wb") as file:
            file.write(os.urandom(500))
        open(self.path("empty"), "w").close()
        make(self.folder, "crl")
        with open(self.path("both"), "wb") as both:  # its certificate would be trusted as a CA's
            for name in CRL, "auth/alt-ca/alt-ca.cert":
                with open(self.path(name), "rb") as file:
                    both.write(file.read())
        none, mixed = "(no certificate or crl found|unreadable)", "not a CRL, or not only that"
        for script, crl, reason in [("server_try", "missing", "No such file or directory"), ("client_try", "missing", "No such file or directory"),
                                    ("server_try", "junk", none), ("client_try", "empty", none), ("client_try", "auth", "Is a directory"),
                                    ("server_try", "auth/alt-ca/alt-ca.cert", mixed), ("client_try", SERVER[1], none),
                                    ("server_try", "both", mixed), ("client_try", "both", mixed)]:
            status, output, errors = run(*python(script), "--port", "1", "--crl", crl, CA, *SERVER, folder=self.folder)
            self.assertEqual((status, output), (1, ""))
            self.assertLine(errors, rf"{script}: {crl}: {reason}; wanted: a list of revoked certificates \(CRL\) in PEM form\n")

        with open(self.path("auth/alt-ca/crlnumber"), "w") as file:
            file.write("01\n")
        alt = ["openssl", "ca", "-config", "auth/test-ca.conf", "-cert", "auth/alt-ca/alt-ca.cert", "-keyfile",
               "auth/alt-ca/alt-ca.key", "-gencrl"]
        self.assertEqual(run(*alt, "-name", "CA_alt", "-crldays", "1", "-out", "alt.crl", folder=self.folder)[0], 0)
        test = [name.replace("alt-ca", "test-ca") for name in alt]
        self.assertEqual(run(*test, "-crlsec", "1", "-out", "expired.crl", folder=self.folder)[0], 0)
        wait_until(lambda: run("openssl", "verify", "-crl_check", "-CRLfile", "expired.crl", "-CAfile", CA, CLIENT[0],
                               folder=self.folder)[0] != 0)
        for crl, reason in ("alt.crl", "(unable to get certificate CRL|CRL signature failure)"), ("expired.crl", "CRL has expired"):
            server = self.serve("--crl", crl)
            self.assertEqual(self.client(server)[:2], (1, ""))
            server.wait_for(PEER + VERIFY + rf"{reason} \({crl}\)")
            server = self.serve()
            self.assertRefused(self.client(server, "--crl", crl), VERIFY + rf"{reason} \({crl}\)")


class Rollover(TestCase):
    """A new CA takes the old one's place, as the README tells it, and no client is ever locked out."""

    def test_with_crls(self):
        old = shutil.copytree(template(ALL), os.path.join(temporary_folder(), "old"))
        new = copy_project(os.path.join(temporary_folder(), "new"))
        make(old, "client-cert", "crl", "NAME=laptop7")
        for request in "client", "server":  # the same keys
            shutil.copy(os.path.join(old, f"auth/{request}.req"), os.path.join(new, "auth"))
            shutil.copy(os.path.join(old, f"auth/{request}.key"), os.path.join(new, "auth"))
        shutil.copy(os.path.join(old, "auth/clients/laptop7.req"), os.path.join(new, "auth/clients"))
        make(new, "certs", "client-cert", "crl", "NAME=laptop7")
        machine = {end: temporary_folder() for end in ("client", "server")}

        def install(end, name, *sources):
            with open(os.path.join(machine[end], name), "wb") as target:
                for source in sources:
                    with open(source, "rb") as file:
                        shutil.copyfileobj(file, target)

        def paths(name, *homes):
            return [os.path.join(home, "auth", name) for home in homes]

        def trust(end, *homes):
            install(end, "ca", *paths("test-ca/test-ca.cert", *homes))
            install(end, "crl", *paths("test-ca/test-ca.crl", *homes))

        for end in machine:
            trust(end, old)
            for name in "crt", "key":
                install(end, name, *paths(f"{end}.{name}", old))
        files = ("ca", "crt", "key")
        with Server("--crl", "crl", files=files, folder=machine["server"]) as server:
            def works(reload=False):
                if reload:
                    server.lines.clear()
                    server.process.send_signal(signal.SIGHUP)
                    server.wait_for("reloaded")
                status, output, errors = client(server.port, "--crl", "crl", files=files, folder=machine["client"])
                self.assertEqual((status, output), (0, "42\n"), errors)

            works()
            trust("server", old, new)
            works(reload=True)
            trust("client", old, new)
            works()
            install("server", "crt", *paths("server.crt", new))
            works(reload=True)
            install("client", "crt", *paths("client.crt", new))
            works()
            make(new, "revoke", "NAME=laptop7")
            trust("server", old, new)
            works(reload=True)
            stolen = ("ca", os.path.join(new, "auth/clients/laptop7.crt"), os.path.join(old, "auth/clients/laptop7.key"))
            self.assertIn("certificate revoked", client(server.port, files=stolen, folder=machine["client"])[2])
            trust("client", new)
            works()
            trust("server", new)
            works(reload=True)
