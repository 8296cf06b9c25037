"""The CA's records: whatever happens to them, no revocation is forgotten and no serial number used twice."""

import calendar
import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import time
import unittest

from support import CA, PATIENCE, PYTHON, Home, template, temporary_folder, wait_until

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
        self.assertLessEqual(set(self.serials("laptop7")), set(revoked))
        self.assertTrue(self.serials("laptop7"))
        rows = self.index()
        serials = [row[3] for row in rows]
        self.assertEqual(len(serials), len(set(serials)))
        self.assertEqual({row[3] for row in rows if row[0] == "R"}, set(revoked))
        for folder, state in ("new_certs", "V"), ("revoked", "R"):
            self.assertLessEqual({name[:-4] for name in os.listdir(self.path("auth/test-ca/" + folder))}, {row[3] for row in rows if row[0] == state})
        self.verify(DB1)
        serial = self.openssl("x509", "-in", DB1, "-noout", "-serial").strip().partition("=")[2]
        self.assertEqual(serial, max(serials))

    def test_whatever_happened_to_a_record_it_is_put_right(self):
        for what, damage in [("missing", lambda data, old: None), ("empty", lambda data, old: b""),
                             ("cut", lambda data, old: data[:len(data) // 2]), ("without their newlines", lambda data, old: data[:-1]),
                             ("junk", lambda data, old: b"\xff\x00junk\n"), ("old", lambda data, old: old),
                             ("with another line's end", lambda data, old: data.replace(b"\n", b"\r\n"))]:
            with self.subTest(what):
                self.setUp()
                for record in (*RECORDS, "index.txt.old"):
                    with open(os.path.join(template(*BEFORE), "auth/test-ca", record.replace(".old", "")), "rb") as file:
                        old = file.read()
                    self.change("auth/test-ca/" + record, lambda data, old=old, damage=damage: damage(data, old))
                self.make("renew")
                self.check_all_is_well()

    def test_all_records_are_lost_but_not_the_list(self):
        stolen = self.serials("laptop7")
        os.remove(self.path(LAPTOP7))  # which would show it again
        for record in RECORDS:
            self.change("auth/test-ca/" + record, lambda data: None)
        for folder in "new_certs", "revoked":
            shutil.rmtree(self.path("auth/test-ca/" + folder))
        self.make("crl")
        self.assertIn("Serial Number: " + stolen[0], self.openssl("crl", "-in", CRL, "-noout", "-text"))
        self.assertIn(f"revoked, but auth/test-ca/revoked has no copy, so their keys are not known: {stolen[0]}\n", self.make("check"))

    def test_the_list_is_lost_or_old(self):
        with open(os.path.join(template(*BEFORE, "revoke NAME=laptop7"), CRL), encoding="utf-8") as file:
            old = file.read().encode()
        self.make("crl")
        newest = self.read(CRL).encode()
        for content, what in (None, "is lost"), (old, "is old (number 1)"):
            self.change(CRL, lambda data, content=content: content)
            for goal in "renew", "crl", "check", "list", "revoke", "client-cert":
                self.assertEqual(self.make(goal, "NAME=db1.internal", status=2).splitlines()[0],
                                 f"{CRL} {what}: copy the newest here from a server, or else those it lists get in again; "
                                 "if no server has a newer one, delete auth/test-ca/crlnumber")
            with open(self.path(CRL), "wb") as file:
                file.write(newest)
        self.make("renew")
        self.check_all_is_well()

    def test_what_records_say_accuses_and_never_acquits(self):
        """A row R is believed, and what it says goes to the evidence; a row V is not."""
        serial, = set(self.serials("db1.internal")[-1:])
        self.change("auth/test-ca/index.txt", lambda data: re.sub(rb"(?m)^V(\t\w+)\t(\t" + serial.encode() + rb"\t)", rb"R\1\t261126000000Z\2", data)
                    .replace(b"R\t", b"V\t", 1))
        self.assertIn(f"{CRL} does not list all that is revoked: make crl\n", self.make("check", status=2))
        self.assertIn(serial + ".pem", os.listdir(self.path("auth/test-ca/revoked")))
        self.make("crl")
        text = self.openssl("crl", "-in", CRL, "-noout", "-text")
        for one in (serial, *self.serials("laptop7")):
            self.assertIn(f"Serial Number: {one}\n", text)
        os.remove(self.path("auth/servers/db1.internal.req"))
        said = "db1.internal (server) has a valid certificate for a revoked key: make revoke NAME=db1.internal\n"
        self.assertIn(said, self.make("check", status=2))  # the one before
        self.make("revoke", "NAME=db1.internal")
        self.assertNotIn(said, self.make("check"))

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
                self.assertEqual(self.make(*arguments, status=2).splitlines()[0], f"{CRL} cannot be read, or is not signed by auth/test-ca/test-ca.cert: "
                                 "copy the newest here from a server")

    def test_serial_numbers_come_from_the_clock_or_are_the_next_free_ones(self):
        self.change("auth/test-ca/serial", lambda data: b"1111\n")
        begun = int(time.time())
        for number in range(4):
            self.make("client-cert", f"NAME=pc{number}")
        used = [int(self.serials(f"pc{number}")[0], 16) for number in range(4)]
        self.assertEqual(used, sorted(set(used)))
        self.assertGreaterEqual(used[0], begun)
        self.assertLess(used[-1], time.time() + 20)
        self.assertFalse(set(used) & {int(serial, 16) for name in ("laptop7", "db1.internal") for serial in self.serials(name)})

    def test_a_home_from_a_backup_remembers_what_the_folders_show(self):
        """The home is as it was before laptop8 got its certificate; the folders and a server's list are newer."""
        shutil.copytree(self.path("auth/test-ca"), self.path("backup"))
        self.make("client-cert", "NAME=laptop8")
        serial, = self.serials("laptop8")
        shutil.rmtree(self.path("auth/test-ca"))
        shutil.copytree(self.path("backup"), self.path("auth/test-ca"))
        self.assertIn("recorded auth/clients/laptop8.crt, of which auth/test-ca/new_certs had no copy\n", self.make("client-cert", "NAME=laptop9"))
        self.assertNotEqual(self.serials("laptop9"), [serial])
        self.assertIn(f"revoked laptop8: {serial}\n", self.make("revoke", "NAME=laptop8"))
        newest = self.read(CRL)
        self.assertIn(f"Serial Number: {serial}\n", self.openssl("crl", "-in", CRL, "-noout", "-text"))
        shutil.rmtree(self.path("auth/test-ca"))
        shutil.copytree(self.path("backup"), self.path("auth/test-ca"))
        with open(self.path(CRL), "w") as file:
            file.write(newest)
        self.make("crl")
        self.assertIn(f"{serial}.pem", os.listdir(self.path("auth/test-ca/revoked")))
        self.assertIn(f"Serial Number: {serial}\n", self.openssl("crl", "-in", CRL, "-noout", "-text"))

    def test_a_delivered_certificate_that_is_there_twice_is_recorded_once(self):
        """After its revoked copy was lost: that comes back whole, and its key is not signed again."""
        shutil.copy(self.path("auth/clients/laptop7.key"), self.path("key"))
        serial, = self.serials("laptop7")
        os.remove(self.path(f"auth/test-ca/revoked/{serial}.pem"))
        shutil.copy(self.path(LAPTOP7), self.path("auth/clients/laptop7-copy.crt"))
        for _ in range(2):
            self.make("list")
            self.assertIn("BEGIN CERTIFICATE", self.read(f"auth/test-ca/revoked/{serial}.pem"))
        os.remove(self.path(LAPTOP7))
        os.remove(self.path("auth/clients/laptop7-copy.crt"))
        self.openssl("req", "-config", "auth/test-ca.conf", "-new", "-key", "key", "-subj", "/CN=pc0", "-out", "auth/clients/pc0.req")
        self.assertIn("has a key that was revoked", self.make("client-cert", "NAME=pc0", status=2))

    def test_what_is_no_file_holds_nobody_up(self):
        os.mkfifo(self.path("auth/clients/f.crt"))
        self.assertIn("f client auth/clients/f.crt cannot be read: make renew\n", self.make("list"))

    def test_a_copy_is_what_it_says_and_not_what_its_name_says(self):
        for name in "laptop7", "db1.internal":
            for folder in "new_certs", "revoked":
                for copy in os.listdir(self.path("auth/test-ca/" + folder)):
                    os.rename(self.path(f"auth/test-ca/{folder}/{copy}"), self.path(f"auth/test-ca/{folder}/0{copy}"))
        self.change("auth/test-ca/index.txt", lambda data: None)
        until_2050 = int(calendar.timegm((2050, 7, 1, 0, 0, 0)) - time.time()) // 86400  # index.txt has two forms of dates
        self.make("renew", f"DAYS={until_2050}")
        rows = self.index()
        self.assertEqual(len({row[3] for row in rows}), 4)
        self.assertEqual([row[3] for row in rows if row[0] == "R"], self.serials("laptop7"))
        self.change("auth/test-ca/index.txt", lambda data: None)
        self.make("crl")
        self.assertEqual([row[:4] for row in self.index()], [row[:4] for row in rows])

    def test_a_row_that_is_none_is_not_kept(self):
        self.change("auth/test-ca/index.txt", lambda data: re.sub(rb"(?m)^V\t\d+", b"V\t991399", data) +
                    re.sub(rb"(?m)^(V.*\t)\w+(\tunknown)", rb"\1xyz\2", data) + b"R\nR\t\t\t\n")
        self.assertEqual(self.make("revoke", "NAME=nobody", status=2).splitlines()[0],
                         "NAME=nobody: this CA has issued no certificate for that; see make list")
        self.make("renew")
        self.check_all_is_well()

    def test_one_machine_that_cannot_be_renewed_does_not_stop_the_others(self):
        os.remove(self.path(DB1))
        os.mkdir(self.path(DB1))
        self.make("client-cert", "NAME=laptop8")
        serials = len(self.index())
        self.assertIn(f"{DB1} NOT renewed: {DB1}.new: Is a directory\n", self.make("renew", status=2))
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
        for kind in "clients/laptop7", "servers/db1.internal":
            os.remove(self.path(f"auth/{kind}.crt"))
        for arguments in ["client-cert", "NAME=laptop8"], ["certs"]:
            self.assertIn("openssl's output is missing although it reported success: is the disk full?\n", self.make(*arguments, openssl, status=2))
        self.assertFalse(os.path.exists(self.path("auth/test-ca/test-ca.cert")))
        self.make("certs", "client-cert", "NAME=laptop8")
        self.assertIn("auth/clients/laptop8.req", set(self.listing()) - set(before))

    def test_two_certificates_with_one_serial_number_are_both_remembered(self):
        """As an earlier release could make them after a restored backup; here it is the name of a copy."""
        one = self.serials("db1.internal")[0]
        shutil.copy(self.path(f"auth/test-ca/new_certs/{one}.pem"), self.path(f"auth/test-ca/revoked/{self.serials('db1.internal')[1]}.pem"))
        self.make("revoke", "NAME=db1.internal")
        self.assertEqual(len(self.serials("db1.internal")), 3)
        self.assertEqual(len(os.listdir(self.path("auth/test-ca/revoked"))), 4)

    def test_what_cannot_make_a_list_leaves_no_sign_of_one_that_was_cut_short(self):
        os.rename(self.path("auth/test-ca/test-ca.key"), self.path("kept"))
        self.make("crl", status=2)
        self.assertFalse(os.path.exists(self.path(CRL + ".new")))
        os.rename(self.path("kept"), self.path("auth/test-ca/test-ca.key"))

    def test_a_date_with_a_reason_is_kept(self):
        self.change("auth/test-ca/index.txt", lambda data: data + b"R\t280101000000Z\t261126000000Z,keyCompromise\t20FF\tunknown\t/CN=ann\n")
        self.make("crl")
        self.assertRegex(self.openssl("crl", "-in", CRL, "-noout", "-text"), r"Serial Number: 20FF\s+Revocation Date: Nov 26 00:00:00 2026")

    def test_a_copy_that_was_cut_short_harms_nobody(self):
        for name, content in ("1120.pem", ""), ("1121.pem", "-----BEGIN CERTIFICATE-----\nMII"):
            with open(self.path("auth/test-ca/new_certs/" + name), "w") as file:
                file.write(content)
        self.make("renew")
        said = self.make("check", status=2)
        for name in "1120.pem", "1121.pem":
            self.assertIn(f"new_certs/{name} cannot be read: restore it, or move it to auth/test-ca/revoked, and make crl\n", said)
        self.assertIn("auth/test-ca/new_certs/1120.pem cannot be read, and may have been for laptop7, too: restore it, or move it to auth/test-ca/revoked, "
                      "and make crl\n", self.make("revoke", "NAME=laptop7", status=2))
        for name in "1120.pem", "1121.pem":
            os.rename(self.path("auth/test-ca/new_certs/" + name), self.path("auth/test-ca/revoked/" + name))
        self.make("crl")
        self.assertRegex(self.openssl("crl", "-in", CRL, "-noout", "-text"), r"(?s)Serial Number: 1120\n.*Serial Number: 1121\n")
        self.check_all_is_well()

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
                open(self.path(CRL + ".new"), "w").close()
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

    def test_two_makes_in_an_empty_home_make_one_ca_and_who_waits_says_so(self):
        for name in "test-ca", "clients":
            shutil.rmtree(self.path("auth/" + name))
        lock = os.open(self.path("auth"), os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with self.start("certs", output=subprocess.PIPE) as one, self.start("client-cert", "NAME=laptop8", output=subprocess.PIPE) as other:
            for process in one, other:
                self.read_to(process, b"waiting for another make that is running here")
            os.close(lock)
            said = one.communicate(timeout=PATIENCE)[0] + other.communicate(timeout=PATIENCE)[0]
            self.assertEqual((one.returncode, other.returncode), (0, 0), said)
        self.assertEqual(said.count(b"auth/test-ca/test-ca.cert already exists, and is kept\n"), 1, said)
        for certificate in "auth/client.crt", "auth/server.crt", "auth/clients/laptop8.crt":
            self.verify(certificate)

    def test_ctrl_c_of_one_that_waits_deletes_nothing_that_another_has_made(self):
        lock = os.open(self.path("auth"), os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in CA, "auth/client.req", "auth/client.crt":
            made = self.read(CA)
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.path(path), self.path("kept"))
            with self.start(path, output=subprocess.PIPE) as process:
                self.read_to(process, b"waiting for another make")
                with open(self.path(path), "w") as file:
                    file.write(made)
                os.killpg(process.pid, signal.SIGINT)
                process.wait(PATIENCE)
            self.assertEqual(self.read(path), made)
        os.close(lock)

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
        self.make("list")
        self.assertEqual(len(set(self.serials("laptop7"))), 2)  # and the one that it made on its own went nowhere

    def test_a_copy_that_openssl_cannot_finish_is_none(self):
        openssl = self.false_openssl('openssl "$@"; case "$*" in *-startdate*) : > "$(ls -t auth/test-ca/*/*.pem | head -n 1)"; kill -9 $PPID; esac\n')
        self.make("renew", openssl, status=2)
        self.make("check")

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
            self.make(*arguments, openssl)
            self.verify(LAPTOP7)
        self.make("crl")
        self.assertIn(f"Serial Number: {before[0][3]}\n", self.openssl("crl", "-in", CRL, "-noout", "-text"))
        self.assertEqual({row[0] for row in self.index()}, {"R"})


if __name__ == "__main__":
    unittest.main()
