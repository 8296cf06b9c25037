"""The CA's home, and files that somebody has made to deceive it."""

import os
import shutil
import ssl
import subprocess

import test_ca_home
from support import CA, Home, make_command, plain_environment, template
from test_ca_home import CA_KEY, CRL, DB1, LAPTOP7

NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")  # which takes less time than RSA

class Hostile(Home):
    """A home with two machines and a list."""

    commands = test_ca_home.Machines.commands

    def request(self, path, subject, *options):
        self.openssl("req", "-config", "auth/test-ca.conf", "-new", *NEW_KEY, "-keyout", "elsewhere.key", "-subj", subject,
                     *options, "-out", path)

    def forge(self, name, *options):
        """Return a client's certificate that its own key has signed."""
        self.openssl("req", "-x509", "-config", "auth/test-ca.conf", "-extensions", "client_cert", *NEW_KEY, "-keyout", "forged.key",
                     "-subj", f"/CN={name}", *options, "-out", "forged")
        return self.read("forged")

    def copies(self):
        return sorted(os.listdir(self.path("auth/test-ca/new_certs")))

    def test_a_list_that_says_verify_ok_and_is_not_signed_by_the_ca(self):
        before = self.read(CRL)
        self.make("revoke", "NAME=laptop7")
        with open(self.path("forge.cnf"), "w") as file:
            file.write('[ca]\ndefault_ca = d\n[d]\ndatabase = forged.txt\ncrlnumber = forged.number\ndefault_md = sha256\n'
                       'crl_extensions = x\n[x]\nnsComment = "verify OK"\n')
        for name, content in ("forged.txt", ""), ("forged.number", "09\n"):
            with open(self.path(name), "w") as file:
                file.write(content)
        subject = self.openssl("x509", "-in", CA, "-noout", "-subject", "-nameopt", "compat").partition("=")[2].strip()
        self.openssl("req", "-x509", "-config", "auth/test-ca.conf", "-extensions", "ca_cert", *NEW_KEY, "-keyout", "forged.key", "-subj", subject, "-out", "forged")
        self.openssl("ca", "-config", "forge.cnf", "-gencrl", "-crldays", "60", "-keyfile", "forged.key", "-cert", "forged", "-out", CRL)
        for goal in "check", "renew", "revoke":
            self.assertEqual(self.make(goal, *["NAME=laptop7"][:goal == "revoke"], status=2).splitlines()[0],
                             f"{CRL} cannot be read, or is not signed by {CA}: copy the newest here from a server")
        self.assertNotEqual(before, self.read(CRL))

    def test_what_is_signed_is_what_was_looked_at(self):
        self.request("good.req", "/CN=web3", "-addext", "subjectAltName = DNS:web3")
        self.request("evil.req", "/CN=db1.internal", "-addext", "subjectAltName = DNS:db1.internal")
        with open(self.path("auth/servers/web3.req"), "w") as file:
            file.write(self.read("good.req").replace("CERTIFICATE REQUEST", "FOO") + self.read("evil.req"))
        before = self.copies()
        says = "auth/servers/web3.req is a request for db1.internal, not web3\n"
        self.assertIn(says, self.make("server-cert", "NAME=web3", status=2))
        self.assertIn(f"auth/servers/web3.crt NOT renewed: {says}", self.make("renew", status=2))
        self.assertEqual(len(self.copies()), len(before) + 2)
        shutil.copy(self.path("good.req"), self.path("auth/servers/web3.req"))
        swap = self.false_openssl('test "$1" != ca || cp evil.req auth/servers/web3.req\nexec openssl "$@"\n')
        self.assertIn("For web3 (web3): ", self.make("server-cert", "NAME=web3", swap))
        self.verify("auth/servers/web3.crt", "-verify_hostname", "web3")

    def test_names_that_only_microsofts_attribute_has_are_seen(self):
        """The one that openssl takes names from where there is no other."""
        def der(tag, content):
            size = len(content)
            return bytes([tag]) + (bytes([size]) if size < 128 else b"\x82" + size.to_bytes(2, "big")) + content
        self.openssl("genrsa", "-out", "ms.key", "2048")
        self.openssl("rsa", "-in", "ms.key", "-pubout", "-outform", "DER", "-out", "public")
        identifiers = [bytes.fromhex(one) for one in ("0603550403", "060a2b06010401823702010e", "0603551d11")]
        subject = der(0x30, der(0x31, der(0x30, identifiers[0] + der(0x0C, b"ms"))))
        names = der(0x30, identifiers[2] + der(0x04, der(0x30, der(0x82, b"db1.internal"))))
        attributes = der(0xA0, der(0x30, identifiers[1] + der(0x31, der(0x30, names))))
        with open(self.path("public"), "rb") as file:
            information = der(0x30, bytes.fromhex("020100") + subject + file.read() + attributes)
        with open(self.path("information"), "wb") as file:
            file.write(information)
        self.openssl("dgst", "-sha256", "-sign", "ms.key", "-out", "signature", "information")
        with open(self.path("signature"), "rb") as file:
            request = der(0x30, information + bytes.fromhex("300d06092a864886f70d01010b0500") + der(0x03, b"\0" + file.read()))
        with open(self.path("auth/clients/ms.req"), "w") as file:
            file.write(ssl.DER_cert_to_PEM_cert(request).replace("CERTIFICATE", "CERTIFICATE REQUEST"))
        self.assertIn("For ms (db1.internal): ", self.make("client-cert", "NAME=ms"))

    def test_a_request_decides_neither_the_text_nor_the_encoding_of_its_certificate(self):
        """A comment would be printed before the certificate as it is; openssl reads BER where DER is due."""
        old = self.read(f"auth/test-ca/new_certs/{self.serials('laptop7')[0]}.pem")
        encoded = "16" + "82%04x" % len("\n" + old) + ("\n" + old).encode().hex()
        name = "db1.internal".encode().hex()
        for number, extension in enumerate([f"nsComment = DER:{encoded}", "crlDistributionPoints = URI:http://x/", f"subjectAltName = DER:3080820c{name}0000",
                                            f"subjectAltName = DER:3010a20e160c{name}", f"subjectAltName = DER:3012a280160c{name}0000"]):
            self.request("auth/clients/odd.req", "/CN=odd", "-addext", extension)
            says = "auth/clients/odd.req " + ("asks for more than names: make a new one" if number < 2 else "cannot be read: restore a backup")
            before = self.copies()
            self.assertEqual(self.make("client-cert", "NAME=odd", status=2).splitlines()[0], says)
            self.assertEqual(self.copies(), before)
        shutil.copy(self.path("auth/clients/odd.req"), self.path("auth/client.req"))
        self.make("certs", status=2)
        self.assertTrue(self.read(LAPTOP7 + ".crt").startswith("-----BEGIN CERTIFICATE-----\n"))  # no text that a reader could be misled by

    def test_a_certificate_of_the_pair_that_a_full_disk_cuts_is_missed(self):
        openssl = self.false_openssl('openssl "$@" || exit\ntest "$1" != ca || { head -c 300 auth/client.crt.new > cut; cat cut > auth/client.crt.new; }\n')
        self.assertIn("auth/client.crt was not written whole: is the disk full?\n", self.make("certs", openssl, status=2))
        self.assertFalse(os.path.exists(self.path("auth/client.crt")))

    def test_one_bad_file_stops_nothing_else(self):
        os.mkfifo(self.path("auth/clients/pipe.req"))
        self.assertIn("pipe.crt NOT renewed: auth/clients/pipe.req is damaged, ", self.make("renew", status=2))
        self.assertIn("auth/clients/pipe.req is damaged, ", self.make("check", status=2))
        self.make("crl")
        os.remove(self.path("auth/clients/pipe.req"))
        os.symlink("loop.crt", self.path("auth/clients/loop.crt"))  # cannot be opened, even by root
        self.make("renew")

    def test_forged_certificates_are_no_evidence(self):
        serial = int(self.serials("laptop7")[0], 16)
        self.make("revoke", "NAME=laptop7")
        self.make("client-cert", "NAME=laptop8")
        self.openssl("req", "-x509", "-config", "auth/test-ca.conf", "-key", "auth/clients/laptop8.key", "-subj", "/CN=bob",
                     "-set_serial", str(serial), "-out", "forged")  # a number that was revoked, and laptop8's key
        forged = self.read("forged").replace("CERTIFICATE", "FOO") + self.read("forged")
        before = self.copies()
        for name, text in [("bob", forged + self.read(DB1 + ".crt")), ("ann", self.read(CA)),
                           ("eve", self.read("forged").replace("CERTIFICATE", "TRUSTED CERTIFICATE") + self.read(DB1 + ".crt"))]:
            with open(self.path(f"auth/clients/{name}.crt"), "w") as file:
                file.write(text)
        self.make("check")
        self.assertEqual(self.copies(), before)
        self.assertIn("laptop8.crt until", self.make("renew"))
        self.assertEqual(len(self.copies()), len(before) + 2)

    def test_a_certificate_is_known_by_more_than_its_number_and_its_key(self):
        der = ssl.PEM_cert_to_DER_cert(self.read(f"auth/test-ca/new_certs/{self.serials('laptop7')[0]}.pem"))
        begin = der.index(b"\x17\x0d") + 2
        with open(self.path("auth/clients/own1.crt"), "w") as file:
            file.write(ssl.DER_cert_to_PEM_cert(der[:begin] + b"40" + der[begin + 2:]))
        self.request("auth/clients/own1.req", "/CN=own1")
        self.make("crl")
        self.assertRegex(self.make("list"), r"own1 client \w+ not issued by this CA\n")
        self.assertIn("auth/clients/own1.crt and its request differ: key\n", self.make("check", status=2))
        with open(self.path("auth/clients/own1.crt"), "w") as file:
            self.openssl("req", "-x509", "-key", "elsewhere.key", "-in", "auth/clients/own1.req", "-out", "forged")
            file.write(self.read(LAPTOP7 + ".crt").replace("CERTIFICATE", "X509 CERTIFICATE") + self.read("forged"))
        self.assertIn("auth/clients/own1.crt and its request differ: key\n", self.make("check", status=2))
        self.make("client-cert", "NAME=own1")
        self.verify("auth/clients/own1.crt", "-purpose", "sslclient")

    def test_a_name_that_reads_otherwise_in_another_string_type(self):
        with open(self.path("bmp.cnf"), "w") as file:
            file.write("[req]\nstring_mask = MASK:2048\ndistinguished_name = empty\n[empty]\n")
        self.openssl("req", "-config", "bmp.cnf", "-new", "-utf8", *NEW_KEY, "-keyout", "elsewhere.key", "-subj", "/CN=\u626d\u7031",
                     "-out", "auth/clients/bmp1.req")
        with open(self.path("auth/clients/bmp1.req")) as file:
            self.assertIn(b"\x1e\x04bmp1", ssl.PEM_cert_to_DER_cert(file.read().replace(" REQUEST", "")))
        self.assertIn("auth/clients/bmp1.req cannot be read: ", self.make("client-cert", "NAME=bmp1", status=2))

    def test_a_clock_that_was_ahead_has_a_way_out(self):
        if not shutil.which("faketime"):
            self.skipTest("faketime is not installed")
        for goal in "client-cert", "revoke":
            ahead = ["faketime", "-f", "+30d", *make_command(goal, "NAME=fut")]
            self.assertEqual(subprocess.run(ahead, cwd=self.folder, env=plain_environment(), stdout=subprocess.DEVNULL).returncode, 0)
        with open(self.path("auth/clients/mallory.crt"), "w") as file:
            file.write(self.forge("mallory"))
        ahead = ["faketime", "-f", "+3000d", "openssl", "req", "-x509", "-config", "auth/test-ca.conf", *NEW_KEY,
                 "-keyout", "forged.key", "-subj", "/CN=eve", "-out", "auth/clients/eve.crt"]
        self.assertEqual(subprocess.run(ahead, cwd=self.folder, stderr=subprocess.DEVNULL).returncode, 0)
        shutil.copy(self.path(LAPTOP7 + ".req"), self.path("auth/clients/eve.req"))
        self.assertIn("begin in the future", self.make("check", status=2))
        self.make("renew", "FORCE=yes", status=2)
        self.make("crl")
        for name in "eve.req", "eve.crt":
            os.remove(self.path(f"auth/clients/{name}"))
        self.make("check")

    def test_no_name_of_a_request_reads_like_a_good_line_or_a_command(self):
        for name in "is valid", "x;touch PWNED", "x until Jan  1 00:00:00 2030 GMT valid":
            self.request(f"auth/clients/{name}.req", f"/CN={name}")
            says = f"auth/clients/{name}.req: name={name}: only letters, digits and . : - _ are allowed\n"
            self.assertIn(says, self.make("check", status=2))
            self.assertIn(f"NOT renewed: {says}", self.make("renew", status=2))
            os.remove(self.path(f"auth/clients/{name}.req"))
        shutil.copy(self.path(LAPTOP7 + ".req"), self.path("auth/clients/\x1b[2Kx.req"))  # no machine
        self.make("check")

    def test_a_valid_certificate_for_a_revoked_key_is_reported_whatever_its_name_has_now(self):
        self.openssl("genrsa", "-out", "one.key", "2048")
        for name in "ann", "bob":
            self.openssl("req", "-new", "-config", "auth/test-ca.conf", "-key", "one.key", "-subj", f"/CN={name}", "-out", f"auth/clients/{name}.req")
            self.make("client-cert", f"NAME={name}")
        os.remove(self.path("auth/clients/bob.req"))
        self.make("client-cert", "NAME=bob")
        self.make("revoke", "NAME=ann")
        self.assertIn("bob (client) has a valid certificate for a revoked key: make revoke NAME=bob\n", self.make("check", status=2))

    def test_a_link_is_replaced_not_followed(self):
        key = self.read(CA_KEY)
        for suffix in ".crt.new", ".req.new", ".key.new":
            os.symlink("../test-ca/test-ca.key", self.path(f"auth/clients/laptop8{suffix}"))
        os.symlink("../test-ca/test-ca.key", self.path(LAPTOP7 + ".crt.new"))
        self.make("renew")
        self.make("client-cert", "NAME=laptop8")
        self.assertEqual(self.read(CA_KEY), key)
        self.assertEqual(os.stat(self.path("auth/clients/laptop8.key")).st_mode & 0o777, 0o600)

    def test_a_list_is_made_even_if_a_request_cannot_be_removed(self):
        serials = self.serials("laptop7")
        os.remove(self.path(LAPTOP7 + ".req"))
        os.mkdir(self.path(LAPTOP7 + ".req"))
        self.assertIn(f"{LAPTOP7}.req: ", self.make("revoke", "NAME=laptop7", status=2))
        for serial in serials:
            self.assertIn(f"Serial Number: {serial}\n", self.openssl("crl", "-in", CRL, "-noout", "-text"))

    def test_a_key_without_its_ca_is_not_replaced(self):
        key = self.read(CA_KEY)
        shutil.rmtree(self.path("auth"))
        shutil.copytree(os.path.join(template(), "auth"), self.path("auth"))
        os.mkdir(self.path("auth/test-ca"))
        with open(self.path(CA_KEY), "w") as file:
            file.write(key)
        self.assertEqual(self.make("client-cert", "NAME=laptop8", status=2).splitlines()[0],
                         f"{CA} is missing, but there is {CA_KEY}: restore a backup, or give everything up with make clean FORCE=yes")
        self.assertEqual(self.read(CA_KEY), key)

    def test_copies_that_cannot_be_read_are_a_ca_in_use(self):
        for name in LAPTOP7, DB1:
            for suffix in ".req", ".crt", ".key":
                os.remove(self.path(name + suffix))
        for name in self.copies():
            self.change(f"auth/test-ca/new_certs/{name}", lambda data: b"")
        self.assertIn("the CA is in use by auth/test-ca/new_certs/", self.make("clean", status=2))

    def test_a_large_file_does_not_hold_up_the_rest(self):
        block = "-----BEGIN CERTIFICATE-----\n"
        for content in block * 100000, ssl.DER_cert_to_PEM_cert(b"\x05\x00" * 1500000):
            with open(self.path("auth/clients/many.crt"), "w") as file:
                file.write(content)
            self.assertIn("many client auth/clients/many.crt cannot be read: make renew\n", self.make("list"))
