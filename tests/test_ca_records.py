"""The CA's records: whatever happens to them, no revocation is forgotten and no serial number used twice."""

import calendar
import fcntl
import os
import re
import shutil
import signal
import subprocess
import time
import unittest

from support import PATIENCE, PYTHON, Home, template, temporary_folder, wait_until

CRL = "auth/test-ca/test-ca.crl"
RECORDS = ("index.txt", "index.txt.attr", "serial", "crlnumber")
LAPTOP7, DB1 = "auth/clients/laptop7.crt", "auth/servers/db1.internal.crt"
BEFORE = ("client-cert NAME=laptop7", "server-cert NAME=db1.internal")
# A library to preload: the nth rename kills the process group, as a power cut would; or no lock can be had.
LIBRARY = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
int rename(const char *from, const char *to) {
    static int count;
    if (getenv("CUT") && ++count == atoi(getenv("CUT"))) kill(0, SIGKILL);
    return ((int (*)(const char *, const char *)) dlsym(RTLD_NEXT, "rename"))(from, to);
}
int flock(int file, int how) {
    if (!getenv("NO_LOCKS")) return 0;
    errno = ENOLCK;
    return -1;
}
"""


class Records(Home):
    """A CA with two machines, one of them stolen and revoked."""

    commands = (*BEFORE, "revoke NAME=laptop7", "renew")

    def check_all_is_well(self):
        """The thief is revoked, no serial number was used twice, and the other machine's certificate is good."""
        revoked = re.findall(r"Serial Number: (\w+)", self.openssl("crl", "-in", CRL, "-noout", "-text"))
        self.assertIn("1111", revoked)
        rows = self.index()
        serials = [row[3] for row in rows]
        self.assertEqual(len(serials), len(set(serials)))
        self.assertEqual({row[3] for row in rows if row[0] == "R"}, set(revoked))
        self.assertLessEqual({name[:-4] for name in os.listdir(self.path("auth/test-ca/new_certs"))}, set(serials))
        self.assertGreater(int(self.read("auth/test-ca/serial"), 16), max(int(serial, 16) for serial in serials))
        self.verify(DB1)
        serial = self.openssl("x509", "-in", DB1, "-noout", "-serial").strip().partition("=")[2]
        self.assertEqual(serial, max(serials))

    def test_whatever_happened_to_a_record_it_is_put_right(self):
        for what, repaired, damage in [("missing", RECORDS, lambda data, old: None), ("empty", RECORDS, lambda data, old: b""),
                                       ("cut", RECORDS, lambda data, old: data[:len(data) // 2]),
                                       ("without their newlines", RECORDS, lambda data, old: data[:-1]),
                                       ("junk", RECORDS, lambda data, old: b"\xff\x00junk\n"),
                                       ("old", ("index.txt", "serial", "crlnumber"), lambda data, old: old),
                                       ("with another line's end", (), lambda data, old: data.replace(b"\n", b"\r\n"))]:
            with self.subTest(what):
                self.setUp()
                for record in (*RECORDS, "index.txt.old"):
                    with open(os.path.join(template(*BEFORE), "auth/test-ca", record.replace(".old", "")), "rb") as file:
                        old = file.read()
                    self.change("auth/test-ca/" + record, lambda data, old=old, damage=damage: damage(data, old))
                self.assertEqual([line for line in self.make("renew").splitlines() if line.startswith("repaired")],
                                 [f"repaired auth/test-ca/{record}, from the certificates and the CRL issued so far" for record in repaired])
                self.check_all_is_well()

    def test_all_records_are_lost_but_not_the_list(self):
        for record in RECORDS:
            self.change("auth/test-ca/" + record, lambda data: None)
        os.remove(self.path("auth/test-ca/index.txt.old"))
        shutil.rmtree(self.path("auth/test-ca/new_certs"))
        os.mkdir(self.path("auth/test-ca/new_certs"))
        self.make("crl")
        self.assertIn("Serial Number: 1111", self.openssl("crl", "-in", CRL, "-noout", "-text"))

    def test_records_and_list_are_lost(self):
        os.remove(self.path(CRL))
        for damage in lambda data: data[:data.rindex(b"V\t")], lambda data: None:
            self.change("auth/test-ca/index.txt", damage)
            for goal in "renew", "crl", "check", "clean":
                self.assertEqual(self.make(goal, status=2).splitlines()[0], f"auth/test-ca/index.txt and {CRL} are lost: "
                                 "restore the CRL, from a server or a back-up; only if there never was one, write 01 to auth/test-ca/crlnumber")
            self.assertFalse(os.path.exists(self.path(CRL)))

    def test_a_first_list_of_nothing_is_one(self):
        shutil.rmtree(self.path("auth"))
        shutil.copytree(os.path.join(template(), "auth"), self.path("auth"))
        self.make("client-cert", "NAME=a b", status=2)  # which has made a CA, and no certificate
        os.remove(self.path("auth/test-ca/index.txt"))
        for goal in "crl", "check", "list", "certs", "clean":
            self.make(goal)

    def test_a_list_that_cannot_be_read_or_is_anothers_stops_it(self):
        good = self.read(CRL).encode()
        self.make("auth/alt-ca/alt-ca.cert")
        with open(self.path("auth/alt-ca/crlnumber"), "w") as file:
            file.write("01\n")
        self.openssl("ca", "-config", "auth/test-ca.conf", "-name", "CA_alt", "-cert", "auth/alt-ca/alt-ca.cert", "-keyfile",
                     "auth/alt-ca/alt-ca.key", "-gencrl", "-crldays", "9", "-out", "alt.crl")
        for bad, *commands in [(b"", ["renew"]), (good[:len(good) // 2], ["revoke", "NAME=db1.internal"]), (b"junk", ["client-cert", "NAME=laptop8"]),
                               (self.read("alt.crl").encode(), ["crl"], ["renew"])]:
            self.change(CRL, lambda data, bad=bad: bad)
            for arguments in commands:
                self.assertEqual(self.make(*arguments, status=2).splitlines()[0], f"{CRL} cannot be read, or is not signed by auth/test-ca/test-ca.cert; "
                                 "restore a back-up")

    def test_a_serial_that_somebody_wrote_is_taken_if_it_is_above_those_used(self):
        for written, used in ("2000", "2000"), ("12345", "012345"), ("0x20000", "020000"), (" 30000 ", "030000"), ("1111", "030001"), ("xyz", "030002"):
            self.change("auth/test-ca/serial", lambda data, written=written: written.encode() + b"\n")
            self.make("client-cert", "NAME=pc" + used)
            self.assertEqual(self.index()[-1][3], used)

    def test_a_copy_is_what_it_says_and_not_what_its_name_says(self):
        for name, other in ("1111", "1100"), ("1112", "01112"):
            os.rename(self.path(f"auth/test-ca/new_certs/{name}.pem"), self.path(f"auth/test-ca/new_certs/{other}.pem"))
        for record in "index.txt", "index.txt.old":
            self.change("auth/test-ca/" + record, lambda data: None)
        until_2050 = int(calendar.timegm((2050, 7, 1, 0, 0, 0)) - time.time()) // 86400  # index.txt has two forms of dates
        self.make("renew", f"DAYS={until_2050}")
        rows = self.index()
        self.assertEqual([row[3] for row in rows], ["1111", "1112", "1113", "1114"])
        for record in "index.txt", "index.txt.old":
            self.change("auth/test-ca/" + record, lambda data: None)
        self.make("list")
        self.assertEqual([row[:4] for row in self.index()], [row[:4] for row in rows])

    def test_a_date_or_a_serial_that_is_none_is_put_right(self):
        self.change("auth/test-ca/index.txt", lambda data: re.sub(rb"(?m)^V\t\d+", b"V\t991399", data) +
                    re.sub(rb"(?m)^(V.*\t)\w+(\tunknown)", rb"\1xyz\2", data))
        os.remove(self.path("auth/test-ca/index.txt.old"))
        self.assertEqual(self.make("revoke", "NAME=nobody", status=2).splitlines()[:2],
                         ["repaired auth/test-ca/index.txt, from the certificates and the CRL issued so far",
                          "nobody: this CA has issued no such certificate; see auth/test-ca/index.txt"])
        self.make("renew")
        self.check_all_is_well()

    def test_one_machine_that_cannot_be_renewed_does_not_stop_the_others(self):
        os.remove(self.path(DB1))
        os.mkdir(self.path(DB1))
        self.make("client-cert", "NAME=laptop8")
        serials = len(self.index())
        self.assertIn(f"{DB1} NOT renewed: Is a directory\n", self.make("renew", status=2))
        self.assertEqual(len(self.index()), serials + 2)
        os.rmdir(self.path(DB1))
        shutil.rmtree(self.path("auth/test-ca/new_certs"))
        self.make("renew")
        self.check_all_is_well()

    def test_what_a_full_disk_leaves_empty_is_not_taken(self):
        """An openssl that says all is well, and has written an empty file, as the real one does on a full disk."""
        openssl = self.false_openssl("""openssl "$@" || exit
while test $# != 0; do if test "$1" = -out; then : > "$2"; fi; shift; done
""")
        before = self.listing()
        shutil.rmtree(self.path("auth/test-ca"))
        for arguments in ["client-cert", "NAME=laptop8"], ["certs"]:
            self.assertIn("openssl has lost what it wrote, and reports no error: is the disk full?\n", self.make(*arguments, openssl, status=2))
        self.assertFalse(os.path.exists(self.path("auth/test-ca/test-ca.cert")))
        self.make("certs", "client-cert", "NAME=laptop8")
        self.assertIn("auth/clients/laptop8.req", set(self.listing()) - set(before))

    def test_a_copy_that_was_cut_short_uses_up_its_serial(self):
        for name, content in ("1120.pem", ""), ("1121.pem", "-----BEGIN CERTIFICATE-----\nMII"):
            with open(self.path("auth/test-ca/new_certs/" + name), "w") as file:
                file.write(content)
        self.make("renew")
        self.assertEqual(self.index()[-1][3], "1122")

    def preload(self):
        if not shutil.which("cc"):
            self.skipTest("no C compiler here")
        library = os.path.join(temporary_folder(), "library.so")
        built = subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-o", library, "-", "-ldl"], input=LIBRARY.encode(), stderr=subprocess.PIPE)
        self.assertEqual(built.returncode, 0, built.stderr)
        return f"env LD_PRELOAD={library} "

    def test_a_power_cut_at_each_rename(self):
        preload = self.preload()
        for arguments, renames in (["renew"], 6), (["revoke", "NAME=db1.internal"], 2):
            for number in range(1, renames + 1):
                with self.subTest(arguments, at_rename=number):
                    self.setUp()
                    with self.start(*arguments, f"OPENSSL={preload}CUT={number} openssl") as cut:
                        self.assertEqual(cut.wait(PATIENCE), -signal.SIGKILL)
                    self.make("renew")
                    if arguments != ["renew"]:
                        self.make("server-cert", "NAME=db1.internal")  # which may be revoked
                    self.check_all_is_well()

    def test_a_power_cut_before_there_is_a_list(self):
        """After one that used up the number of the first list, and left none."""
        preload, self.commands = self.preload(), BEFORE
        for number in range(1, 7):
            with self.subTest(at_rename=number):
                self.setUp()
                self.change("auth/test-ca/crlnumber", lambda data: b"02\n")
                with self.start("renew", f"OPENSSL={preload}CUT={number} openssl") as cut:
                    self.assertEqual(cut.wait(PATIENCE), -signal.SIGKILL)
                self.assertIn(f"{DB1} until", self.make("renew"))

    def test_without_a_lock_nothing_is_done(self):
        preload = self.preload()
        before = self.listing()
        for arguments in ["renew"], ["client-cert", "NAME=laptop8"], ["clean"]:
            said = self.make(*arguments, f"PYTHON={preload}NO_LOCKS=1 {' '.join(PYTHON)}", status=2)
            self.assertRegex(said.splitlines()[0], r"^[a-z-]+: No locks available$")
        self.assertEqual(self.listing(), before)


class Together(Home):
    """Two makes at a time, and interrupts."""

    commands = ("client-cert NAME=laptop7",)

    def held(self, process):
        """Check that a process changes nothing, and goes on waiting."""
        before = self.listing(), self.read("auth/test-ca/index.txt")
        with self.assertRaises(subprocess.TimeoutExpired):
            process.wait(0.5)
        self.assertEqual((self.listing(), self.read("auth/test-ca/index.txt")), before)

    def test_one_at_a_time(self):
        for arguments in ["renew"], ["revoke", "NAME=laptop7"], ["server-cert", "NAME=db1"], ["certs"]:
            before = self.read("auth/test-ca/index.txt")
            lock = os.open(self.path("auth"), os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            with self.start(*arguments) as process:
                self.held(process)
                os.close(lock)
                self.assertEqual(process.wait(PATIENCE), 0)
            self.assertNotEqual(self.read("auth/test-ca/index.txt"), before)

    def test_an_openssl_that_goes_on_alone_holds_the_lock(self):
        os.mkfifo(self.path("end"))
        openssl = self.false_openssl('if test "$1" = ca; then kill -9 $PPID; read line < end; fi\nexec openssl "$@"\n')
        with self.start("renew", openssl) as killed:
            killed.wait(PATIENCE)
        with self.start("renew") as process:
            self.held(process)
            with open(self.path("end"), "w") as end:
                end.write("\n")
            self.assertEqual(process.wait(PATIENCE), 0)
        self.assertEqual([row[3] for row in self.index()], ["1111", "1112", "1113"])

    def test_what_ctrl_c_cuts_short_the_next_run_puts_right(self):
        """In the middle of `openssl ca`, which renames its records one by one."""
        openssl = self.false_openssl('if test "$1" = ca; then rm auth/test-ca/index.txt; kill -INT 0; fi\nopenssl "$@"\n')
        with self.start("renew", openssl, output=subprocess.PIPE) as process:
            self.assertNotIn(b"Traceback", process.communicate(timeout=PATIENCE)[0])
        wait_until(lambda: self.gone(process.pid))
        self.verify(LAPTOP7)
        self.assertIn(LAPTOP7 + " until", self.make("renew"))
        self.assertEqual(len(self.index()), 2)

    def test_interrupted_at_any_time_it_loses_nothing(self):
        for number in range(5):
            with self.start("renew") as process:
                time.sleep(0.03 * number)
                os.killpg(process.pid, signal.SIGINT)
            self.verify(LAPTOP7)
        self.assertIn(LAPTOP7 + " until", self.make("renew"))

    def test_what_is_revoked_beside_renewals_stays_so(self):
        for number in range(3):
            self.make("client-cert", f"NAME=pc{number}")
            with self.start("renew") as renewal:
                time.sleep(0.07 * number)
                self.make("revoke", f"NAME=pc{number}")
                self.assertEqual(renewal.wait(PATIENCE), 0)
            self.assertEqual({row[0] for row in self.index() if row[5].endswith(f"/CN=pc{number}")}, {"R"})
        self.assertNotIn("pc", self.make("renew"))
        serials = [row[3] for row in self.index()]
        self.assertEqual(len(serials), len(set(serials)))

    def test_records_that_a_full_disk_would_empty(self):
        """An openssl that says all is well, and has emptied its records, as the real one does on a full disk."""
        before = self.index()
        openssl = self.false_openssl('openssl "$@"; status=$?\nif test "$1" = ca; then : > auth/test-ca/index.txt; fi\nexit $status\n')
        for arguments in ["renew"], ["revoke", "NAME=laptop7"]:
            self.assertIn("openssl has lost what it wrote, and reports no error: is the disk full?\n", self.make(*arguments, openssl, status=2))
            self.assertEqual(self.index()[0][3:], before[0][3:])
            self.verify(LAPTOP7)


if __name__ == "__main__":
    unittest.main()
