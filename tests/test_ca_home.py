"""The CA's home fails safe: whatever happens to its records, no revocation is forgotten and no serial number used twice."""

import glob
import os
import re
import shutil
import signal
import subprocess
import unittest

from support import CA, FAST, MAKE, PATIENCE, TestCase, copy_project, make, plain_environment, run, temporary_folder

CRL = "auth/test-ca/test-ca.crl"
THIEF = "auth/clients/laptop7.crt"
# Kills its process group at the nth rename of a file, as a power cut would.
CUT = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdlib.h>
int rename(const char *from, const char *to) {
    static int count;
    if (++count == atoi(getenv("CUT"))) kill(0, SIGKILL);
    return ((int (*)(const char *, const char *)) dlsym(RTLD_NEXT, "rename"))(from, to);
}
"""


class Home(TestCase):
    """A CA with two machines, one of them revoked; its home is made once, and copied for each test."""

    template = None

    def setUp(self):
        if Home.template is None:
            Home.template = copy_project(os.path.join(temporary_folder(), "home"))
            for arguments in ["client-cert", "NAME=laptop7"], ["server-cert", "NAME=db1.internal", "NAMES=db1 10.0.0.7 fd00::7"]:
                make(Home.template, FAST, *arguments)
            shutil.copytree(Home.template, Home.template + " of before")
            make(Home.template, "revoke", "NAME=laptop7")
            make(Home.template, "renew")
        self.home = os.path.join(temporary_folder(), "a home")
        shutil.copytree(Home.template, self.home)

    def path(self, name):
        return os.path.join(self.home, name)

    def openssl(self, *arguments):
        status, output, errors = run("openssl", *arguments, folder=self.home)
        self.assertEqual(status, 0, output + errors)
        return output

    def change(self, name, change):
        """Write what change() makes of a file's bytes; None removes it."""
        with open(self.path(name), "rb") as file:
            changed = change(file.read())
        if changed is None:
            os.remove(self.path(name))
        else:
            with open(self.path(name), "wb") as file:
                file.write(changed)

    def check_all_is_well(self):
        """The thief is revoked, no serial number was used twice, and the other machine's certificate is good."""
        revoked = re.findall(r"Serial Number: (\w+)", self.openssl("crl", "-in", CRL, "-noout", "-text"))
        self.assertIn("1111", revoked)
        with open(self.path("auth/test-ca/index.txt")) as index:
            rows = [line.rstrip("\n").split("\t") for line in index]
        serials = [row[3] for row in rows]
        self.assertEqual(len(serials), len(set(serials)))
        self.assertEqual({row[3] for row in rows if row[0] == "R"}, set(revoked))
        for file in glob.glob(self.path("auth/test-ca/new_certs/*.pem")):
            self.assertIn(os.path.basename(file)[:-4], serials)
            self.assertIn(os.path.basename(file)[:-4], self.openssl("x509", "-in", file, "-noout", "-serial"))
        with open(self.path("auth/test-ca/serial")) as file:
            self.assertGreater(int(file.read(), 16), max(int(serial, 16) for serial in serials))
        self.openssl("verify", "-x509_strict", "-CAfile", CA, "auth/servers/db1.internal.crt")


class Records(Home):
    def test_whatever_happened_to_a_record_it_is_put_right(self):
        before = Home.template + " of before/auth/test-ca/"
        for record in "index.txt", "index.txt.attr", "serial", "crlnumber":
            old = b""
            if os.path.exists(before + record):
                with open(before + record, "rb") as file:
                    old = file.read()
            for what, damage in [("missing", lambda data: None), ("empty", lambda data: b""), ("cut", lambda data: data[:len(data) // 2]),
                                 ("without its newline", lambda data: data[:-1]), ("old", lambda data, old=old: old),
                                 ("junk", lambda data: b"\xff\x00junk\n")]:
                with self.subTest(record, was=what):
                    shutil.rmtree(self.home)
                    shutil.copytree(Home.template, self.home)
                    self.change("auth/test-ca/" + record, damage)
                    said = make(self.home, "renew")
                    if record == "index.txt" or (record == "serial" and what != "without its newline"):
                        self.assertIn("put right: auth/test-ca/" + record, said)
                    self.check_all_is_well()
                    self.assertNotIn("put right", make(self.home, "renew"))

    def test_all_records_are_lost(self):
        for record in "index.txt", "index.txt.attr", "serial", "crlnumber":
            self.change("auth/test-ca/" + record, lambda data: None)
        shutil.rmtree(self.path("auth/test-ca/new_certs"))
        os.mkdir(self.path("auth/test-ca/new_certs"))
        make(self.home, "crl")
        self.assertIn("Serial Number: 1111", self.openssl("crl", "-in", CRL, "-noout", "-text"))

    def test_a_crl_that_cannot_be_read_stops_it(self):
        for damage in lambda data: b"", lambda data: data[:len(data) // 2], lambda data: b"junk":
            shutil.copy(os.path.join(Home.template, CRL), self.path(CRL))
            self.change(CRL, damage)
            for arguments in ["renew"], ["crl"], ["revoke", "NAME=db1.internal"], ["client-cert", "NAME=laptop8", FAST]:
                self.assertIn("test-ca.crl cannot be read", make(self.home, *arguments, status=2))

    def test_a_power_cut_at_each_rename(self):
        if not shutil.which("cc"):
            self.skipTest("no C compiler here")
        library = os.path.join(temporary_folder(), "cut.so")
        built = subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-o", library, "-", "-ldl"], input=CUT.encode(), stderr=subprocess.PIPE)
        self.assertEqual(built.returncode, 0, built.stderr)
        for arguments in ["renew"], ["revoke", "NAME=db1.internal"]:
            for number in range(1, 8):
                with self.subTest(arguments, at_rename=number):
                    shutil.rmtree(self.home)
                    shutil.copytree(Home.template, self.home)
                    cut = subprocess.Popen([MAKE, *arguments, f"OPENSSL=env LD_PRELOAD={library} CUT={number} openssl"],
                                           cwd=self.home, env=plain_environment(), start_new_session=True, stdin=subprocess.DEVNULL,
                                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                    self.addCleanup(cut.wait)
                    cut.wait(PATIENCE)
                    make(self.home, "renew")
                    self.check_all_is_well()


class Said(Home):
    def test_names_in_the_environment_do_not_count(self):
        environment = dict(plain_environment(), NAME="db1.internal", NAMES="x", SERIAL="1112", FORCE="yes")
        before = self.openssl("crl", "-in", CRL, "-noout", "-text")
        for goal, says in [("revoke", "a name is missing"), ("server-cert", "a name is missing"), ("clean", "in use")]:
            done = subprocess.run([MAKE, goal], cwd=self.home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            self.assertEqual(done.returncode, 2)
            self.assertIn(says, done.stdout.decode())
        self.assertEqual(self.openssl("crl", "-in", CRL, "-noout", "-text"), before)
        self.assertTrue(os.path.exists(self.path("auth/servers/db1.internal.req")))

    def test_a_request_without_a_certificate_gets_one(self):
        os.remove(self.path("auth/servers/db1.internal.crt"))
        self.assertIn("auth/servers/db1.internal.crt until", make(self.home, "renew"))

    def test_a_request_that_is_another_machines_is_not_signed(self):
        make(self.home, FAST, "server-cert", "NAME=db2.internal")
        shutil.copy(self.path("auth/servers/db2.internal.req"), self.path("auth/servers/db1.internal.req"))
        with open(self.path("auth/servers/db1.internal.crt")) as file:
            good = file.read()
        said = make(self.home, "renew", status=2)
        self.assertIn("db1.internal.req is a request for db2.internal, not db1.internal", said)
        with open(self.path("auth/servers/db1.internal.crt")) as file:
            self.assertEqual(file.read(), good)
        self.assertIn("is a request for db2.internal", make(self.home, "check", status=2))

    def test_a_slow_clock_changes_nothing(self):
        if not shutil.which("faketime"):
            self.skipTest("faketime is not installed")
        def state():
            return sorted((name, os.stat(name).st_mtime_ns) for name in glob.glob(self.path("auth/**"), recursive=True) if os.path.isfile(name))
        before = state()
        for arguments in ["renew"], ["crl"], ["client-cert", "NAME=laptop8"]:
            done = subprocess.run(["faketime", "-f", "-30d", MAKE, *arguments], cwd=self.home, env=plain_environment(),
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            self.assertEqual(done.returncode, 2)
            self.assertIn("the clock is wrong, nothing is done", done.stdout.decode())
            self.assertEqual(state(), before)

    def test_certificates_and_lists_begin_an_hour_early(self):
        for command in ["x509", "-in", "auth/servers/db1.internal.crt", "-startdate"], ["crl", "-in", CRL, "-lastupdate"]:
            begin = self.openssl(*command, "-noout").partition("=")[2].strip()
            early = subprocess.run(["date", "-u", "-d", begin, "+%s"], stdout=subprocess.PIPE)
            if early.returncode:
                self.skipTest("this date(1) reads no dates")
            made = os.stat(self.path(command[2])).st_mtime
            if command[0] == "x509" or re.match("OpenSSL [3-9]", self.openssl("version")):
                self.assertAlmostEqual(int(early.stdout), made - 3600, delta=PATIENCE)

    def test_a_companys_name_comes_out_whole_or_is_refused(self):
        for number, (name, shown) in enumerate([("Müller & Söhne", "Müller & Söhne"), (r"A\+B Ltd", "A+B Ltd"), (r"A\/B Ltd", "A/B Ltd")]):
            make(self.home, FAST, "client-cert", f"NAME=pc{number}", f"ORGANIZATION=/C=NZ/L=Köln/O={name}")
            text = self.openssl("x509", "-in", f"auth/clients/pc{number}.crt", "-noout", "-subject", "-nameopt", "sep_comma_plus,utf8")
            self.assertRegex(text, f"C ?= ?NZ,L ?= ?Köln,O ?= ?{re.escape(shown)},OU ?= ?Client,CN ?= ?pc{number}")
        for name in "/O=A+B Ltd", "/O=A/B Ltd", "/DC=example/O=x", "/street=x", "O=x", "", "/O=":
            self.assertIn("ORGANIZATION=", make(self.home, "client-cert", "NAME=pc9", f"ORGANIZATION={name}", status=2))
            self.assertFalse(os.path.exists(self.path("auth/clients/pc9.key")))

    def test_a_lost_ca_certificate_is_not_replaced(self):
        os.remove(self.path(CA))
        key = self.path("auth/test-ca/test-ca.key")
        with open(key) as file:
            before = file.read()
        for arguments in ["certs"], ["server-cert", "NAME=db9"]:
            self.assertIn("restore a back-up", make(self.home, *arguments, status=2))
        with open(key) as file:
            self.assertEqual(file.read(), before)

    def test_days_that_are_none(self):
        for setting in "DAYS=x", "DAYS=0", "CRL_DAYS=":
            self.assertIn("not a number of days", make(self.home, "renew", setting, status=2))

    def test_names(self):
        for goal in "client-cert", "server-cert":
            for names, says in [(["NAME=" + "a" * 65], "NAME=aaa"), (["NAME=db1.internal."], "NAME=db1.internal.: "), (["NAME=a..b"], "NAME=a..b: "),
                                (["NAME=" + "a" * 64 + ".x"], "too long"), (["NAME=a", "NAMES=a,b"], "NAMES=a,b: "),
                                (["NAME=a", "NAMES=" + "b" * 64], "NAMES=bbb")]:
                self.assertIn(says, make(self.home, goal, *names, status=2))
        self.assertEqual(glob.glob(self.path("auth/*/a*")), [])
        long = ".".join(["a" * 60] * 3)
        make(self.home, FAST, "server-cert", "NAME=db3", "NAMES=" + long)
        self.assertIn("DNS:" + long, self.openssl("x509", "-in", "auth/servers/db3.crt", "-noout", "-text"))
        make(self.home, "server-cert", "NAME=db1.internal", "NAMES=10.0.0.7 fd00::7 db1")
        self.assertIn("has other names", make(self.home, "server-cert", "NAME=db1.internal", "NAMES=db2", status=2))

    def test_clean_spares_machines_whose_records_are_gone(self):
        os.remove(self.path("auth/test-ca/index.txt"))
        self.assertIn("db1.internal", make(self.home, "clean", status=2))
        shutil.rmtree(self.path("auth/test-ca"))
        self.assertIn("db1.internal", make(self.home, "clean", status=2))
        make(self.home, "clean", "FORCE=yes")
        self.assertFalse(os.path.exists(self.path("auth/servers")))

    def test_a_list_of_a_thousand_certificates_needs_few_calls_of_openssl(self):
        with open(self.path("auth/test-ca/index.txt")) as file:
            row = file.readlines()[1].split("\t")
        with open(self.path("auth/test-ca/index.txt"), "a") as file:
            for serial in range(0x2000, 0x2000 + 1000):
                file.write("\t".join([*row[:3], f"{serial:X}", *row[4:]]))
        self.change("auth/test-ca/serial", lambda data: b"23E8\n")
        with open(self.path("openssl"), "w") as file:
            file.write('#!/bin/sh\necho >> calls\nexec openssl "$@"\n')
        os.chmod(self.path("openssl"), 0o755)
        lines = make(self.home, "list", "OPENSSL=./openssl").splitlines()
        self.assertEqual(len(lines), 4, lines)
        self.assertRegex("\n".join(lines), "(?m)^db1.internal Server 23E7 until .* valid$")
        self.assertLess(os.path.getsize(self.path("calls")), 12)

    def test_one_certificate_is_revoked_by_its_serial_number(self):
        first = self.openssl("x509", "-in", "auth/servers/db1.internal.crt", "-noout", "-serial").strip().partition("=")[2]
        make(self.home, "renew")
        self.assertIn(f"revoked {first}\n", make(self.home, "revoke", f"SERIAL={first.lower()}"))
        self.openssl("verify", "-crl_check", "-CRLfile", CRL, "-CAfile", CA, "auth/servers/db1.internal.crt")
        self.assertNotEqual(run("openssl", "verify", "-crl_check", "-CRLfile", CRL, "-CAfile", CA, f"auth/test-ca/new_certs/{first}.pem",
                                folder=self.home)[0], 0)
        self.assertIn("no such certificate", make(self.home, "revoke", "SERIAL=99", status=2))

    def test_check(self):
        self.assertEqual(len(make(self.home, "check").splitlines()), 3)
        self.assertRegex(make(self.home, "check"), "(?m)^auth/servers/db1.internal.crt until .* valid$")
        make(self.home, "renew", "DAYS=20")
        self.assertRegex(make(self.home, "check", status=2), "(?m)^auth/servers/db1.internal.crt until .* expires soon$")
        make(self.home, "renew", "CRL_DAYS=20")
        self.assertRegex(make(self.home, "check", status=2), "(?m)^auth/test-ca/test-ca.crl until .* expires soon$")
        make(self.home, "renew")
        certificate = "auth/servers/db1.internal.crt"
        with open(self.path(certificate)) as file:
            good = file.read()
        os.remove(self.path(certificate))
        self.assertIn(certificate + " is missing", make(self.home, "check", status=2))
        make(self.home, FAST, "alt-certs", "certs")
        shutil.copy(self.path("auth/alt-server.crt"), self.path(certificate))
        self.assertIn(certificate + " and auth/servers/db1.internal.req differ: key", make(self.home, "check", status=2))
        self.change(certificate, lambda data: good.encode())
        for _ in range(8):  # so that its serial number is not one that is revoked here
            os.remove(self.path("auth/alt-client.crt"))
            make(self.home, "alt-certs")
        shutil.copy(self.path("auth/alt-client.crt"), self.path("auth/client.crt"))
        self.assertIn("auth/client.crt is not signed by", make(self.home, "check", status=2))
        os.remove(self.path(CRL))
        self.assertIn("test-ca.crl is missing", make(self.home, "check", status=2))


if __name__ == "__main__":
    unittest.main()
