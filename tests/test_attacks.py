"""What attackers found once, each held so that it stays mended."""

import os
import re
import socket
import struct
import threading

from support import (ACCEPTED, CA, CLIENT, PATIENCE, PEER, SERVER, UNTIL, VERIFY, Server, TestCase, client,
                     reset, run, served, temporary_folder)


class Certificates(TestCase):
    """Signed by our CA, and yet strange."""

    def sign(self, subject, oids="", extensions=""):
        """Return the files of a certificate for client.key with a subject, given as -subj wants it."""
        folder = temporary_folder()
        config, request, certificate, extfile = (os.path.join(folder, name) for name in ("conf", "req", "crt", "ext"))
        with open(extfile, "w") as file:
            file.write(extensions)
        with open(config, "w") as file:
            file.write(f"oid_section = oids\n[oids]\n{oids}\n[req]\ndistinguished_name = empty\n[empty]\n")
        for command in [["req", "-config", config, "-new", "-key", CLIENT[1], "-subj", subject, "-out", request],
                        ["x509", "-req", "-in", request, "-CA", CA, "-CAkey", "auth/test-ca/test-ca.key", "-set_serial", "9",
                         "-days", "1", "-extfile", extfile, "-out", certificate]]:
            status, _, errors = run("openssl", *command)
            self.assertEqual(status, 0, errors)
        return certificate, CLIENT[1]

    def test_object_identifier_of_4_kB(self):
        files = self.sign("/longoid=x/CN=example.com", "longoid = 1.2." + ".".join(["4294967295"] * 400))
        with Server(files=(CA, *files)) as server:
            self.assertRefused(client(server.port), "turned away: a certificate that cannot be decoded")
        with Server() as server:
            client(server.port, files=(CA, *files))
            server.wait_for(PEER + "turned away: a certificate that cannot be decoded")

    def test_a_long_subject_is_cut_and_its_name_stands_first(self):
        files = self.sign("/CN=laptop7" + "".join(f"/OU={'x' * 60}{number}" for number in range(5)))
        with Server() as server:
            self.assertEqual(client(server.port, files=(CA, *files))[1], "42\n")
            subject = server.wait_for(ACCEPTED % "(CN=laptop7, OU=x{60}4, OU=x{60}3, OU=x+)")[1]
            self.assertEqual(len(subject), 200)

    def test_no_subject_and_no_alternative_name(self):
        files = self.sign("/", extensions="basicConstraints = CA:FALSE\n")
        with Server() as server:
            self.assertEqual(client(server.port, files=(CA, *files))[1], "42\n")
            server.wait_for(ACCEPTED % "a certificate without a name")

    def test_an_empty_subject_is_shown_by_its_alternative_names(self):
        files = self.sign("/", extensions="subjectAltName = URI:spiffe://example.com/laptop7, DNS:laptop7\n")
        with Server() as server:
            self.assertEqual(client(server.port, files=(CA, *files))[1], "42\n")
            server.wait_for(ACCEPTED % "URI=spiffe://example.com/laptop7, DNS=laptop7")

    def test_an_intermediate_ca_is_trusted_where_it_is_given(self):
        files = {}
        for name, issuer, extensions in [("middle", None, "basicConstraints = CA:TRUE\n"), ("leaf", "middle", "")]:
            folder = temporary_folder()
            key, request, certificate, extfile = (os.path.join(folder, kind) for kind in ("key", "req", "crt", "ext"))
            with open(extfile, "w") as file:
                file.write(extensions)
            ca, ca_key = files.get(issuer, (CA, "auth/test-ca/test-ca.key"))
            for command in [["req", "-config", "auth/test-ca.conf", "-new", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}",
                             "-keyout", key, "-out", request],
                            ["x509", "-req", "-in", request, "-CA", ca, "-CAkey", ca_key, "-set_serial", "9", "-days", "1", "-extfile",
                             extfile, "-out", certificate]]:
                status, _, errors = run("openssl", *command)
                self.assertEqual(status, 0, errors)
            files[name] = certificate, key
        with Server(files=(files["middle"][0], *SERVER)) as server:
            server.wait_for(f"trusting CN=middle {UNTIL}")
            self.assertEqual(client(server.port, files=(CA, *files["leaf"]))[:2], (0, "42\n"), server.log())
            self.assertEqual(client(server.port)[0], 1)  # which the root has signed, and nobody said to trust that

class Handshakes(TestCase):
    def test_costly_groups_are_refused(self):
        with Server() as server:
            for group in "ffdhe8192", "ffdhe4096":
                status, _, errors = run("openssl", "s_client", "-groups", group, "-connect", f"127.0.0.1:{server.port}", "-CAfile", CA,
                                        "-cert", CLIENT[0], "-key", CLIENT[1])
                if "-groups" in errors:  # as a command that it does not know
                    self.skipTest(f"this openssl does not offer {group}")
                server.wait_for(PEER + "turned away: no suitable key share")
                server.lines.clear()

    def test_a_server_name_does_not_decide_who_refused(self):
        with Server() as server:
            for name in "EOF.example.com", "CRL.example.com", "a] b alert the weather is fine":
                self.assertRefused(client(server.port, "--server-name", name),
                                   f"{VERIFY}Hostname mismatch, certificate is not valid for '{re.escape(name)}'\\.")

    def test_alerts_of_every_name_are_the_other_ends(self):
        names = {48: "unknown ca", 110: "unsupported extension", 111: "certificate unobtainable", 112: "unrecognized name",
                 113: "bad certificate status response", 114: "bad certificate hash value",
                 115: "(unknown psk identity|an alert without a name)", 120: "(no application protocol|an alert without a name)", 116: "certificate required", 199: "an alert without a name"}
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
                self.assertRefused(client(listener.getsockname()[1]), f"turned us away: {name}")
            thread.join(PATIENCE)

    def test_reset_before_the_server_looks(self):
        with Server() as server:
            for data in b"", b"x" * 1000:
                with server.halted():
                    stranger = socket.create_connection(("127.0.0.1", server.port))
                    stranger.sendall(data)
                    reset(stranger)
                server.wait_for(PEER + "hung up in the handshake")
                server.lines.clear()
            self.assertEqual(served(server.port), b"42\n")
            self.assertNotRegex(server.log(), "Traceback|wrapper")
