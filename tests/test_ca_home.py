"""The CA's home: what make's server-cert, client-cert, renew, revoke, crl, list, check and clean do."""

import contextlib
import glob
import os
import pty
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
import unittest

from support import (ACCEPTED, ALL, ANOTHER_CA, CA, EXAMPLE, PATIENCE, Home, Server, client, make, make_command, plain_environment,
                     run, template, temporary_folder)

CRL = "auth/test-ca/test-ca.crl"
CA_KEY = "auth/test-ca/test-ca.key"
VALID_LIST = f"{CRL} is valid for 30 days: copy it to every machine that uses it, and send the servers SIGHUP"
DB1 = "auth/servers/db1.internal"
LAPTOP7 = "auth/clients/laptop7"


class Names(Home):
    commands = ("client-cert NAME=laptop7",)

    def test_each_kind_of_name_gets_a_certificate_for_its_role_once(self):
        for role, name, shown in [("server", "db1.internal", "DNS:db1.internal"), ("client", "db1.internal", "DNS:db1.internal"),
                                  ("server", "192.0.2.7", "IP Address:192.0.2.7"), ("client", "build-server", "DNS:build-server"),
                                  ("server", "2001:db8::1", "IP Address:2001:DB8:0:0:0:0:0:1"), ("client", "004217", "DNS:004217"),
                                  ("client", "00:11:22:33:44:55", "DNS:00:11:22:33:44:55")]:
            file = f"auth/{role}s/{name}"
            self.assertIn(f"For {name} ({name}): {file}.crt, {file}.key and {CA}\n", self.make(f"{role}-cert", f"NAME={name}"))
            text = self.openssl("x509", "-noout", "-text", "-in", file + ".crt")
            self.assertIn(shown, text)
            self.assertRegex(text, f"CN ?= ?{name}")
            self.verify(file + ".crt", "-purpose", "ssl" + role)
            self.assertEqual(os.stat(self.path(file + ".key")).st_mode & 0o777, 0o600)
            self.assertEqual(self.read(file + ".crt").count("BEGIN CERTIFICATE"), 2)  # the CA's own goes along
        before = self.read(DB1 + ".crt")
        self.make("server-cert", "NAME=db1.internal")
        self.assertEqual(self.read(DB1 + ".crt"), before)
        with Server(folder=self.folder, files=(CA, DB1 + ".crt", DB1 + ".key")) as server:
            files = (CA, LAPTOP7 + ".crt", LAPTOP7 + ".key")
            self.assertEqual(client(server.port, "--server-name", "db1.internal", files=files, folder=self.folder)[:2], (0, "42\n"))
            server.wait_for(ACCEPTED % EXAMPLE.replace("example.com", "laptop7") % "Client")

    def test_names_that_are_none_get_a_sentence_each_and_leave_nothing(self):
        before = self.listing()
        characters, dots = "only letters, digits and . : - _ are allowed", ("it must not begin with a hyphen or a dot, end with a dot, "
                             "or have two dots in a row")
        address, long = "not an IP address (a port does not belong here)", "too long: at most %d characters, and 63 between dots"
        for name, says in [("", "a name is missing: NAME=db1.internal, or an address, NAME=192.0.2.7"),
                           ("a b", characters), ("*.internal", characters), ("../x", characters), ("$(HOME)", characters), ("a'b;c", characters),
                           ("-x", dots), (".x", dots), ("db1.internal.", dots), ("a..b", dots),
                           ("a" * 64, long % 64), ("a" * 60 + ".bcde", long % 64),
                           ("999.1.1.1", address), ("::zz", address), ("host:8080", address)]:
            said = self.make("server-cert", f"NAME={name.replace('$', '$$')}", status=2)
            self.assertEqual(said.splitlines()[0], f"NAME={name}: {says}")
        for names, says in ("a,b", characters), ("one ::zz", address), ("b" * 64, long % 253):
            said = self.make("server-cert", "NAME=fine", f"NAMES={names}", status=2)
            self.assertEqual(said.splitlines()[0], f"NAMES={names.split()[-1]}: {says}")
        self.assertEqual(self.listing(), before)

    def test_settings_in_the_environment_do_not_count(self):
        environment = dict(plain_environment(), NAME="laptop7", NAMES="x", FORCE="yes")
        for goal, says in [("revoke", "a name is missing: NAME=laptop7"),
                           ("server-cert", "a name is missing"), ("clean", "in use")]:
            self.assertIn(says, self.make(goal, environment=environment, status=2))
        self.assertEqual(os.listdir(self.path("auth/test-ca/revoked")), [])
        self.assertTrue(os.path.exists(self.path(LAPTOP7 + ".req")))

    def test_a_companys_name_comes_out_whole_or_is_refused(self):
        self.make("client-cert", "NAME=pc0", r"ORGANIZATION=/C=NZ/L=Köln/O=Müller & Söhne/O=A\+B Ltd/O=A\/B Ltd/OU=Warning Not After : Up Date: X")
        text = self.openssl("x509", "-in", "auth/clients/pc0.crt", "-noout", "-subject", "-nameopt", "sep_comma_plus,utf8")
        self.assertIn("C=NZ,L=Köln,O=Müller & Söhne,O=A+B Ltd,O=A/B Ltd,OU=Warning Not After : Up Date: X,OU=Client,CN=pc0", text.replace(" = ", "="))
        self.make("renew")
        self.assertNotIn("arning", self.make("check"))
        for name in "/O=A+B Ltd", "/O=A/B Ltd", "/DC=example/O=x", "/street=x", "O=x", "/O=x/C=NZ", "/O=", "/O=$$(touch seen)", "/O=`touch seen`":
            self.assertEqual(self.make("client-cert", "NAME=pc9", f"ORGANIZATION={name}", status=2).splitlines()[0],
                             f"ORGANIZATION={name.replace('$$', '$')}: /C=, /ST=, /L=, /O=, /OU= are allowed, in this order; write \\+ for +, "
                             '\\/ for /, and none of $ ` "')
        self.assertFalse(os.path.exists(self.path("auth/clients/pc9.key")))

    def test_what_makes_command_line_sets_reaches_no_shell_unseen(self):
        shutil.rmtree(self.path("auth/test-ca"))
        shutil.rmtree(self.path("auth/clients"))
        for setting in ("ORGANIZATION=/O=$$(touch seen)", "CA_SUBJECT=/CN=$$(touch seen)", "SERIAL=1; touch seen", "CA_DAYS=`touch seen`",
                        "DAYS=1; touch seen", "CRL_DAYS=1;touch seen", "SERVER_NAMES=DNS:x; touch seen", "NEWKEY=rsa:2048; touch seen"):
            for goal in "certs", "client-cert":
                said = self.make(goal, "NAME=pc9", setting, status=2)
                self.assertIn(setting.partition("=")[0] + "=", said.splitlines()[0])
        for goal, setting in ("clean", "FORCE='; touch seen; '"), ("demo", "PORT=0; touch seen"), ("client-cert", "NAMES=x; touch seen"), ("certs", "CA=`touch seen`"):
            self.make(goal, setting, "NAME=pc9", status=0 if goal in ("clean", "certs") else 2)
        self.assertFalse(os.path.exists(self.path("seen")))

    def test_a_companys_name_in_the_makefile_that_make_would_cut_is_refused(self):
        for sign, line, refused in [("=", "/O=C# Consulting", True), ("=", "/O=A$AP Ltd", True), (":=", "/O=C# Consulting", True),
                                    ("?=", "/O=A$(Money)", True), ("=", "/O=C\\# Consulting", False)]:
            setting = f"ORGANIZATION {sign} {line}"
            self.change("Makefile", lambda data, setting=setting: re.sub(rb"(?m)^ORGANIZATION .*", setting.encode().replace(b"\\", b"\\\\"), data))
            said = self.make("client-cert", "NAME=pc0", status=2 if refused else 0)
            if refused:
                self.assertEqual(said.splitlines()[0], f"Makefile: {setting}: write \\# for #; $ and a final \\ are not allowed")
        self.assertRegex(self.openssl("x509", "-in", "auth/clients/pc0.crt", "-noout", "-subject"), "O ?= ?C# Consulting, ")
        self.make("auth/client.crt", "CA_SUBJECT=/O=B\u00e4ckerei M\u00fcller/CN=B\u00e4ckerei M\u00fcller CA", "ORGANIZATION=/O=B\u00e4ckerei M\u00fcller")
        self.assertIn("O=B\u00e4ckerei M\u00fcller,", self.openssl("x509", "-in", "auth/client.crt", "-noout", "-subject", "-nameopt", "sep_comma_plus,utf8,sname"))

        self.change("Makefile", lambda data: re.sub(rb"(?m)^ORGANIZATION .*", b"ORGANIZATION = /O=A \\\\\n C# Ltd", data))
        self.assertIn("Makefile: ORGANIZATION = /O=A \\: write ", self.make("client-cert", "NAME=pc0", status=2))

    def test_days_that_are_none_are_refused(self):
        for setting in "DAYS=x", "DAYS=0", "CRL_DAYS=":
            self.assertEqual(self.make("renew", setting, status=2).splitlines()[0], f"{setting}: a number of days from 1 to 99999 is needed")

    def test_what_openssl_warns_of_is_passed_on(self):
        openssl = self.false_openssl('test "$1" != req || echo "Warning: something is cut"; exec openssl "$@"\n')
        self.assertIn("Warning: something is cut\n", self.make("client-cert", "NAME=pc0", openssl))


class Machines(Home):
    commands = ("server-cert NAME=db1.internal NAMES='db1 10.0.0.7 fd00::7'", "client-cert NAME=laptop7", "crl")

    def revoked(self):
        """Return the serial numbers that the list has."""
        return re.findall(r"Serial Number: (\w+)", self.openssl("crl", "-in", CRL, "-noout", "-text"))

    def test_renewal_needs_no_key_and_keeps_the_names(self):
        os.remove(self.path(DB1 + ".key"))  # it has gone to its machine
        what = ("x509", "-noout", "-pubkey", "-subject", "-ext", "subjectAltName,extendedKeyUsage,basicConstraints", "-in", DB1 + ".crt")
        before, serial = self.openssl(*what), self.openssl("x509", "-noout", "-serial", "-in", DB1 + ".crt")
        self.assertRegex(before, "DNS:db1.internal, DNS:db1, IP Address:10.0.0.7, IP Address:FD00:0:0:0:0:0:0:7")
        number = self.openssl("crl", "-noout", "-crlnumber", "-in", CRL)
        self.assertEqual([re.sub(r" until \w+ .* GMT", " until", line) for line in self.make("renew").splitlines()],
                         [LAPTOP7 + ".crt until valid", DB1 + ".crt until valid", VALID_LIST,
                          "Copy each .crt to its machine; servers need SIGHUP."])
        self.assertEqual(self.openssl(*what), before)
        self.assertNotEqual(self.openssl("x509", "-noout", "-serial", "-in", DB1 + ".crt"), serial)
        self.assertNotEqual(self.openssl("crl", "-noout", "-crlnumber", "-in", CRL), number)
        self.assertIn(f"For db1.internal (db1.internal, 10.0.0.7, db1, fd00::7): {DB1}.crt and {CA}\n", self.make("server-cert", "NAME=db1.internal"))
        self.assertFalse(os.path.exists(self.path(DB1 + ".key")))

    def test_the_same_names_again_are_no_error_and_others_are(self):
        self.make("server-cert", "NAME=db1.internal", "NAMES=10.0.0.7 fd00::7 db1")
        self.assertIn("has other names: delete it and run this again, for a new key", self.make("server-cert", "NAME=db1.internal", "NAMES=db2", status=2))
        name, long = "a" * 63, ".".join(["a" * 63] * 3 + ["a" * 61])
        self.make("server-cert", f"NAME={name}", f"NAMES={name}.b")
        self.make("server-cert", "NAME=" + "a" * 62 + ".b", f"NAMES={long}")
        self.assertIn("DNS:" + long, self.openssl("x509", "-in", "auth/servers/" + "a" * 62 + ".b.crt", "-noout", "-text"))

    def test_a_request_that_came_from_another_ca_can_be_given_up(self):
        shutil.rmtree(self.path("auth/test-ca"))
        self.assertIn("auth/test-ca/test-ca.cert is missing, but there is auth/clients/laptop7.crt", self.make("crl", "certs", status=2) + self.make("certs", status=2))
        os.remove(self.path(LAPTOP7 + ".crt"))
        os.rename(self.path(DB1 + ".crt"), self.path("kept"))
        self.make("certs")
        os.rename(self.path("kept"), self.path(DB1 + ".crt"))
        other = "server-cert", "NAME=db1.internal", "NAMES=db2"
        self.assertIn("has other names: delete it and run this again, for a new key", self.make(*other, status=2))
        self.assertIn(f"deleted {DB1}.req, but revoked nothing: {DB1}.crt is damaged, or from another CA\n", self.make("revoke", "NAME=db1.internal", status=2))
        self.assertIn("revoked laptop7: no certificate, but deleted the request\n", self.make("revoke", "NAME=laptop7"))
        self.make(*other)
        self.assertIn("DNS:db2", self.openssl("x509", "-in", DB1 + ".crt", "-noout", "-text"))

    def test_a_request_decides_nothing_but_names(self):
        self.openssl("req", "-config", "auth/test-ca.conf", "-new", "-key", LAPTOP7 + ".key", "-subj", "/CN=laptop7",
                     "-addext", "basicConstraints = CA:TRUE", "-addext", "extendedKeyUsage = serverAuth", "-addext",
                     "subjectAltName = DNS:laptop7", "-out", LAPTOP7 + ".req")
        self.make("renew")
        text = self.openssl("x509", "-noout", "-text", "-in", LAPTOP7 + ".crt")
        self.assertIn("CA:FALSE", text)
        self.assertIn("TLS Web Client Authentication", text)
        self.assertNotIn("TLS Web Server Authentication", text)

    def test_renew_goes_by_the_requests(self):
        os.remove(self.path(DB1 + ".crt"))
        self.change(LAPTOP7 + ".crt", lambda data: data[:len(data) // 3])
        said = self.make("renew")
        for path in DB1, LAPTOP7:
            self.assertIn(f"{path}.crt until", said)
        good = self.read(DB1 + ".crt")
        os.remove(self.path(DB1 + ".req"))
        self.assertNotIn("db1", self.make("renew"))
        self.assertEqual(self.read(DB1 + ".crt"), good)

    def test_what_is_made_is_nobody_elses_to_write_and_certificates_and_lists_are_anyones_to_read(self):
        shutil.rmtree(self.path("auth/clients"))
        run("sh", "-c", 'umask 0; exec "$@"', "sh", *make_command("client-cert", "NAME=laptop8"), folder=self.folder)
        run("sh", "-c", 'umask 77; exec "$@"', "sh", *make_command("renew"), folder=self.folder)
        for name in (".", *self.listing()):
            self.assertEqual(os.stat(self.path(name)).st_mode & 0o022, 0, name)
            self.assertEqual(os.stat(os.path.dirname(self.path(name))).st_mode & 0o022, 0, name)
        for name in CRL, DB1 + ".crt", "auth/clients/laptop8.crt":
            self.assertEqual(os.stat(self.path(name)).st_mode & 0o777, 0o644)

    def test_nobody_of_the_group_may_swap_what_the_ca_has(self):
        run("sh", "-c", 'umask 2; mkdir -p auth/test-ca/new_certs; chmod 775 auth auth/test-ca; exec "$@"', "sh", *make_command("renew"), folder=self.folder)
        for name in "auth", "auth/test-ca", "auth/test-ca/new_certs", CA, CRL:
            self.assertEqual(os.stat(self.path(name)).st_mode & 0o022, 0, name)

    def test_where_output_is_closed_or_nobody_reads_it(self):
        for how in ">&-", "2>&-", ">&- 2>&- <&-", "| head -n 1":
            for goal in "list", "check", "renew":
                _, output, errors = run("sh", "-c", f'"$@" {how}', "sh", *make_command(goal), folder=self.folder)
                self.assertNotRegex(output + errors, "Traceback|Exception")
        self.make("check")

    def test_a_passphrase_on_the_cas_key(self):
        self.openssl("pkey", "-in", CA_KEY, "-aes128", "-passout", "pass:secret", "-out", "encrypted")
        os.replace(self.path("encrypted"), self.path(CA_KEY))
        self.assertIn(f"{CA_KEY} has a passphrase: not checked\n", self.make("check"))
        says = f"{CA_KEY} has a passphrase, but there is no terminal"
        for goal in "client-cert", "crl":
            self.assertEqual(self.make(goal, "NAME=pc0", status=2).splitlines()[0], says)
        self.assertEqual(self.make("renew", status=2).splitlines()[0], says)
        self.assertEqual(self.make("auth/client.req", "auth/client.crt", status=2).splitlines()[-2], says)
        interrupted = self.false_openssl('if test "$1" = ca; then kill -INT 0; fi\nexec openssl "$@"\n')
        for answer, status, says, *more in [(b"secret\n", 0, b"Copy each .crt"), (b"secret\n", -signal.SIGINT, b"make: ", interrupted),
                                            (b"wrong\n", 2, b"wrong passphrase for auth/test-ca/test-ca.key\r\nmake")]:
            terminal, other_end = pty.openpty()
            command = [sys.executable, "-c", "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"]
            with subprocess.Popen([*command, *make_command("renew", *more)], cwd=self.folder, env=plain_environment(), stdin=other_end, stdout=other_end,
                                  stderr=other_end) as process:
                os.close(other_end)
                said = b""
                with contextlib.suppress(OSError):
                    while True:
                        said += os.read(terminal, 1000)
                        if said.endswith(b"Passphrase of auth/test-ca/test-ca.key: "):
                            os.write(terminal, answer)
                self.assertIn(process.wait(PATIENCE), (status, 2) if more else (status,), said)
            os.close(terminal)
            self.assertIn(says, said)
            self.assertNotIn(b"Traceback", said)
            if status == 0:
                self.assertEqual(said.count(b"Passphrase of"), 1)  # for two certificates and a list

    def test_a_ca_that_has_expired_is_called_that(self):
        if not shutil.which("faketime"):
            self.skipTest("faketime is not installed")
        for goal in "renew", "certs", "client-cert":
            said = self.at_another_time("+366d", goal, "NAME=laptop7" if goal == "client-cert" else "QUIET=yes")
            self.assertTrue(said.stdout.startswith(f"{CA} has expired: see 'A new CA' in auth/README.md, or".encode()), said.stdout)
            self.assertEqual(said.returncode, 2)

    def test_a_key_that_a_full_disk_swallows_is_missed(self):
        openssl = self.false_openssl('openssl "$@" || exit\ntest "$1" != req || cp /dev/null auth/test-ca/tmp*/key\n')
        self.assertIn("is the disk full?\n", self.make("server-cert", "NAME=q", openssl, status=2))
        self.assertFalse(os.path.exists(self.path("auth/servers/q.req")))

    def test_without_the_cas_key_nothing_is_begun(self):
        os.remove(self.path(CA_KEY))
        for goal in "renew", "crl", "client-cert", "revoke":
            self.assertEqual(self.make(goal, "NAME=laptop7" if goal == "revoke" else "NAME=pc0", status=2).splitlines()[0],
                             f"{CA_KEY} is missing, or cannot be read: restore a backup")
        self.assertTrue(os.path.exists(self.path(LAPTOP7 + ".req")))  # a revocation that fails has not begun

    def test_a_list_that_would_forget_somebody_is_not_put_in_its_place(self):
        """An openssl that makes the list as it was before."""
        shutil.copy(self.path(CRL), self.path("before"))
        openssl = self.false_openssl('case "$*" in *-gencrl*) for new; do :; done; cp before "$new"; exit;; esac\nexec openssl "$@"\n')
        said = self.make("revoke", "NAME=laptop7", openssl, status=2)
        self.assertEqual(said.splitlines()[0], f"{CRL}: a new one would not list all that is revoked; the old one is kept")
        self.make("crl")
        self.assertEqual(self.revoked(), self.serials("laptop7"))

    def test_renewal_without_a_ca_is_refused(self):
        shutil.rmtree(self.path("auth/test-ca"))
        for goal in "renew", "crl", "list", "check":
            self.assertEqual(self.make(goal, status=2).splitlines()[0], f"no CA here ({CA}): run make certs first, or restore a backup; if only that file is lost, each machine has a copy")

    def test_a_request_that_is_another_machines_is_not_signed(self):
        self.make("server-cert", "NAME=db2.internal")
        shutil.copy(self.path("auth/servers/db2.internal.req"), self.path(DB1 + ".req"))
        good, copies = self.read(DB1 + ".crt"), len(os.listdir(self.path("auth/test-ca/new_certs")))
        said = self.make("renew", status=2)
        self.assertIn(f"{DB1}.crt NOT renewed: {DB1}.req is a request for db2.internal, not db1.internal\n", said)
        self.assertEqual(self.read(DB1 + ".crt"), good)
        self.assertEqual(len(os.listdir(self.path("auth/test-ca/new_certs"))), copies + 2)
        self.assertIn("is a request for db2.internal", self.make("check", status=2))

    def test_what_does_not_verify_takes_nobodys_place(self):
        good = self.read(LAPTOP7 + ".crt")
        openssl = self.false_openssl('test "$1" != verify && openssl "$@"\n')
        self.assertEqual([line.partition(":")[0] for line in self.make("renew", openssl, status=2).splitlines()][:2],
                         [f"{LAPTOP7}.crt NOT renewed", f"{DB1}.crt NOT renewed"])
        self.assertEqual(self.read(LAPTOP7 + ".crt"), good)
        self.assertIn(LAPTOP7 + ".crt until", self.make("renew"))
        self.assertEqual(len({row[3] for row in self.index()}), 4)  # what did not verify was not issued

    @unittest.skipUnless(shutil.which("faketime"), "faketime is not installed")
    def test_a_slow_clock_changes_nothing(self):
        def state():
            return {name: os.stat(self.path(name)).st_mtime_ns for name in self.listing()}
        before = state()
        for arguments in ["renew"], ["crl"], ["client-cert", "NAME=laptop8"], ["check"]:
            done = self.at_another_time("-30d", *arguments)
            self.assertEqual(done.returncode, 2)
            self.assertEqual(done.stdout.decode().splitlines()[0], f"the clock is wrong, so nothing is done: {CA}, {CRL}, {LAPTOP7}.crt, {DB1}.crt would begin in the future; "
                             "if the clock is right, wait until " + re.search("until (.* GMT), or", done.stdout.decode())[1] + ", or make clean FORCE=yes")
            self.assertEqual(state(), before)
        self.at_another_time("+30d", "client-cert", "NAME=laptop8")
        self.assertEqual(self.make("renew", status=2).splitlines()[0],
                         "the clock is wrong, so nothing is done: auth/clients/laptop8.crt would begin in the future; if the clock is right, make renew FORCE=yes")
        self.at_another_time("+30d", "renew")
        number = self.openssl("crl", "-in", CRL, "-noout", "-crlnumber")
        self.assertIn(f"{CRL}, ", self.make("crl", status=2).splitlines()[0])
        self.make("renew", "FORCE=yes")
        self.make("check")
        self.assertGreater(self.openssl("crl", "-in", CRL, "-noout", "-crlnumber"), number)

    def at_another_time(self, shift, *arguments):
        return subprocess.run(["faketime", "-f", shift, *make_command(*arguments)], cwd=self.folder, env=plain_environment(),
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def test_certificates_and_lists_begin_an_hour_early(self):
        for command in ["x509", "-in", DB1 + ".crt", "-startdate"], ["crl", "-in", CRL, "-lastupdate"]:
            begin = time.strptime(self.openssl(*command, "-noout").partition("=")[2].strip(), "%b %d %H:%M:%S %Y GMT")
            made = time.gmtime(os.stat(os.path.join(template(*self.commands), command[2])).st_mtime)
            if command[0] == "x509" or re.match("OpenSSL [3-9]", self.openssl("version")):
                self.assertAlmostEqual(time.mktime(begin), time.mktime(made) - 3600, delta=PATIENCE)

    def test_the_end_of_the_ca_is_told(self):
        for days, state in (340, "valid"), (350, "expires soon"):
            self.assertRegex(self.make("check", f"DAYS={days}", status=0 if state == "valid" else 2), f"(?m)^{CA} until .* {state}$")

    def test_a_lost_ca_certificate_is_not_replaced(self):
        before = self.read("auth/test-ca/test-ca.key")
        for lost in "test-ca.cert", "index.txt", "new_certs/*":
            for name in glob.glob(os.path.join(glob.escape(self.path("auth/test-ca")), lost)):
                os.remove(name)
            for arguments in ["certs"], ["server-cert", "NAME=db9"]:
                self.assertIn(f"{CA} is missing, but there is ", self.make(*arguments, status=2))
        self.assertEqual(self.read("auth/test-ca/test-ca.key"), before)

    def test_all_that_a_machine_ever_had_is_revoked_and_nothing_else(self):
        for arguments in ["client-cert", "NAME=laptop70"], ["server-cert", "NAME=laptop7"], ["renew"]:
            self.make(*arguments, "ORGANIZATION=/O=Caf\u00e9")
        for name in "nobody", "", "a b", "../client", "aptop7":
            self.make("revoke", f"NAME={name}", status=2)
        self.assertEqual({row[0] for row in self.index()}, {"V"})
        for _ in range(2):
            serials = " ".join(self.serials("laptop7"))
            self.assertEqual(self.make("revoke", "NAME=laptop7"),
                             f"{VALID_LIST}\nrevoked laptop7: {serials}\n")
            self.assertEqual([row[5].rpartition("=")[2] for row in self.index() if row[0] == "R"], ["laptop7"] * 4)
            before = re.findall("Revocation Date: .*", self.openssl("crl", "-in", CRL, "-noout", "-text"))
        text = self.openssl("crl", "-in", CRL, "-noout", "-text")
        self.assertIn("Version 2", text)
        self.assertEqual(re.findall("Revocation Date: .*", text), before)  # when it was first revoked
        self.assertNotIn("laptop7.crt", self.make("renew"))
        self.make("client-cert", "NAME=laptop7")  # with a new key
        self.assertEqual(len([row for row in self.index() if row[0] == "V" and row[5].endswith("/CN=laptop7")]), 1)

    def test_a_key_that_was_revoked_is_never_signed_again(self):
        for suffix in "req", "key":
            shutil.copy(self.path(f"{LAPTOP7}.{suffix}"), self.path(suffix))
        self.make("revoke", "NAME=laptop7")
        revoked = self.revoked()
        shutil.copy(self.path("req"), self.path(LAPTOP7 + ".req"))  # as from a backup
        self.openssl("req", "-config", "auth/test-ca.conf", "-new", "-key", "key", "-subj", "/CN=db2", "-out", "auth/servers/db2.req")
        for path in LAPTOP7, "auth/servers/db2":
            says = f"{path}.req has a key that was revoked: make revoke NAME={os.path.basename(path)}, then a new key"
            self.assertIn(f"{path}.crt NOT renewed: {says}\n", self.make("renew", status=2))
            self.assertIn(says + "\n", self.make("check", status=2))
            self.assertIn(says + "\n", self.make("client-cert" if path == LAPTOP7 else "server-cert", f"NAME={os.path.basename(path)}", status=2))
        self.assertIn(f"{DB1}.crt until", self.make("renew", status=2))  # the others are renewed
        self.assertEqual(self.revoked(), revoked)
        os.remove(self.path(LAPTOP7 + ".req"))
        os.remove(self.path("auth/servers/db2.req"))
        shutil.copy(self.path("key"), self.path("auth/client.key"))
        self.openssl("req", "-config", "auth/test-ca.conf", "-new", "-key", "key", "-subj", "/CN=example.com", "-out", "auth/client.req")
        self.assertIn("auth/client.req has a key that was revoked: delete it, and make it again\n", self.make("auth/client.crt", status=2))
        os.remove(self.path("auth/client.req"))
        for form in "compressed", "hybrid":  # in which the key has other bits
            self.openssl("ec", "-in", "key", "-conv_form", form, "-out", "same.key")
            self.openssl("req", "-config", "auth/test-ca.conf", "-new", "-key", "same.key", "-subj", "/CN=evil", "-out", "auth/clients/evil.req")
            self.assertIn("auth/clients/evil.req has a key that was revoked: ", self.make("client-cert", "NAME=evil", status=2))
        os.remove(self.path("auth/clients/evil.req"))
        self.make("client-cert", "NAME=laptop7")
        self.verify(LAPTOP7 + ".crt", "-crl_check", "-CRLfile", CRL)

    def test_a_request_made_elsewhere(self):
        def request(path, subject, *names):
            self.openssl("req", "-config", "auth/test-ca.conf", "-new", "-newkey", "rsa:2048", "-nodes", "-keyout", "elsewhere.key", "-subj", subject,
                         *(["-addext", f"subjectAltName = {', '.join(names)}"] if names else []), "-out", path)
        request("auth/clients/web3.req", "/CN=web3/O=Else/OU=Client", "DNS:web3", "DNS:db1.internal", "IP:10.0.0.99")
        self.assertIn(f"For web3 (web3, 10.0.0.99, db1.internal): auth/clients/web3.crt and {CA}\n", self.make("client-cert", "NAME=web3"))
        self.verify("auth/clients/web3.crt", "-purpose", "sslclient")
        request("auth/clients/._web4.req", "/CN=web4")  # as a Mac leaves it on a stick
        request("auth/clients/bob.req", "/CN=Users\\/CN=bob")
        request("auth/clients/ann.req", "/CN=ann/CN=bob")
        request("auth/servers/web5.req", "/CN=web5")
        self.change("auth/servers/web5.req", lambda data: data.replace(data.splitlines()[-2], data.splitlines()[-2][:20] + b"AAAA" + data.splitlines()[-2][24:]))
        self.change("auth/servers/web5.req", self.damaged)
        said, checked = self.make("renew", status=2), self.make("check", status=2)
        for path, says in [("auth/clients/bob", "auth/clients/bob.req is a request for Users/CN=bob, not bob"),
                           ("auth/clients/ann", "auth/clients/ann.req is a request for ann, bob, not ann"),
                           ("auth/servers/web5", "auth/servers/web5.req is damaged, not in PEM form, or not signed by its own key")]:
            self.assertIn(f"{path}.crt NOT renewed: {says}\n", said)
            self.assertIn(says + "\n", checked)
            self.assertFalse(os.path.exists(self.path(path + ".crt")))
        self.assertNotIn("web4", said)
        request("auth/clients/eve.req", "/CN=eve", "DNS:bank.internal", "DNS:\x1b[2K\rFor eve (eve")
        self.assertIn("auth/clients/eve.req: name=\\x1b[2K\\rFor eve (eve: only letters, ", self.make("client-cert", "NAME=eve", status=2))
        for name, says in [("DNS:10.0.0.7", "the name DNS:10.0.0.7 should be IP:10.0.0.7"),
                           ("email:eve@internal", "name=eve@internal: only letters, digits and . : - _ are allowed")]:
            request("auth/clients/eve.req", "/CN=eve", name)
            self.assertEqual(self.make("client-cert", "NAME=eve", status=2).splitlines()[0], f"auth/clients/eve.req: {says}")
        self.openssl("req", "-config", "auth/test-ca.conf", "-new", "-newkey", "rsa:2048", "-nodes", "-keyout", "elsewhere.key", "-subj", "/CN=odd",
                     "-addext", "1.2.3.4.5 = critical, ASN1:UTF8:x", "-out", "auth/clients/odd.req")
        for goal in "client-cert", "renew", "check":
            self.assertIn("auth/clients/odd.req asks for more than names: make a new one\n", self.make(goal, *["NAME=odd"][:goal == "client-cert"], status=2))

    @staticmethod
    def damaged(data):
        """Return a request with another bit in its signature, which stands last."""
        der = bytearray(ssl.PEM_cert_to_DER_cert(data.decode().replace(" REQUEST", "")))
        der[-1] ^= 1
        return ssl.DER_cert_to_PEM_cert(bytes(der)).replace("CERTIFICATE", "CERTIFICATE REQUEST").encode()

    def test_what_an_earlier_run_left_is_not_taken_for_a_new_certificate(self):
        """An openssl that says all is well, and writes nothing, as the real one does where a request's signature is wrong."""
        good = self.read(LAPTOP7 + ".crt")
        shutil.copy(self.path(DB1 + ".crt"), self.path(LAPTOP7 + ".crt.new"))
        killed = self.false_openssl('test "$1" = ca && kill -9 $$\nexec openssl "$@"\n')
        self.assertIn(f"{LAPTOP7}.crt NOT renewed: openssl ca: status -9\n", self.make("renew", killed, status=2))
        openssl = self.false_openssl('test "$1" = ca && exit 0\nexec openssl "$@"\n')
        self.assertIn(f"{LAPTOP7}.crt NOT renewed: openssl's output is missing although it reported success: is the disk full?\n",
                      self.make("renew", openssl, status=2))
        self.assertEqual(self.read(LAPTOP7 + ".crt"), good)

    def test_the_list_has_a_line_a_machine(self):
        self.make("renew")
        self.make("revoke", "NAME=laptop7")
        self.make("server-cert", "NAME=db2", "DAYS=3")
        self.make("certs")
        self.make("crl", "CRL_DAYS=3")
        self.assertEqual([re.sub(r"until \w+ .* GMT", "until", line) for line in self.make("list").splitlines()],
                         [f"{CA} CA until valid", f"db1.internal server {self.serials('db1.internal')[-1]} until valid",
                          f"db2 server {self.serials('db2')[-1]} until expires soon", "example.com client 1111 until valid", "example.com server 1112 until valid",
                          f"laptop7 client {self.serials('laptop7')[-1]} revoked", f"{CRL} CRL 04 until expires soon"])
        self.change(LAPTOP7 + ".crt", lambda data: b"junk")
        self.assertIn(f"laptop7 client {LAPTOP7}.crt cannot be read: make renew\n", self.make("list"))

    def test_a_thousand_certificates_need_few_calls_of_openssl(self):
        """A thousand copies of one, which is as much to read."""
        copy = self.read(f"auth/test-ca/new_certs/{self.serials('laptop7')[0]}.pem")
        for number in range(1000):
            with open(self.path(f"auth/test-ca/new_certs/{number:04X}.pem"), "w") as file:
                file.write(copy)
        self.assertEqual(len(self.make("list", self.false_openssl('echo >> calls\nexec openssl "$@"\n')).splitlines()), 4)
        self.assertLess(os.path.getsize(self.path("calls")), 5)

    def test_no_ca_that_the_system_trusts_is_taken_for_ours(self):
        other = os.path.join(temporary_folder(), "other")
        shutil.copytree(template(), other)
        make(other, "server-cert", "NAME=db1.internal", "CA_SUBJECT=/CN=Other")
        shutil.copy(os.path.join(other, DB1 + ".crt"), self.path(DB1 + ".crt"))
        os.mkdir(self.path("system"))
        its = os.path.join(other, CA)
        shutil.copy(its, self.path(f"system/{self.openssl('x509', '-noout', '-hash', '-in', its).strip()}.0"))
        shutil.copy(os.path.join(other, DB1 + ".req"), self.path(DB1 + ".req"))
        said = self.make("check", environment=dict(plain_environment(), SSL_CERT_DIR=self.path("system")), status=2)
        self.assertRegex(said, f"{DB1}.crt does not verify with {CA}: {ANOTHER_CA}\n")

    def test_clean_spares_a_ca_that_is_in_use_whatever_is_left_of_it(self):
        self.assertRegex(self.make("clean", status=2), "the CA is in use by db1.internal laptop7; to delete it all the same: make clean FORCE=yes\n")
        for name in "servers/db1.internal", "clients/laptop7":
            for suffix in "req", "crt", "key":
                os.remove(self.path(f"auth/{name}.{suffix}"))
        self.assertIn("in use by db1.internal laptop7; ", self.make("clean", status=2))
        os.remove(self.path("auth/test-ca/index.txt"))
        self.assertIn("in use by db1.internal laptop7; ", self.make("clean", status=2))
        self.make("crl")
        self.make("client-cert", "NAME=example.com")  # a name that the pair has, too
        shutil.rmtree(self.path("auth/test-ca"))
        self.assertIn("in use by example.com; ", self.make("clean", status=2))
        self.make("clean", "FORCE=yes")
        self.assertEqual(sorted(os.listdir(self.path("auth"))), ["README.md", "clients", "machines", "servers", "test-ca.conf"])
        self.assertEqual(self.listing(), self.listing(template()))


class Judged(Home):
    """A CA with two machines and the pair, and another CA."""

    commands = (ALL, *Machines.commands)

    def test_check_tells_what_is_wrong(self):
        def check(status=2):
            said = re.sub(r"until \w+ .* GMT", "until", self.make("check", status=status))
            return [line for line in re.sub(f"(?m): {ANOTHER_CA}$", ": its CA is another", said).splitlines() if not line.startswith("make: ")]
        well = [f"{name} until valid" for name in (CA, CRL, "auth/client.crt", "auth/server.crt", LAPTOP7 + ".crt", DB1 + ".crt")]
        self.assertEqual(check(status=0), well)
        for damages in [
                [(None, None, well[0]), (None, None, well[1]),
                 (CA_KEY, lambda data: self.read("auth/alt-ca/alt-ca.key").encode(), f"{CA_KEY} is not the key of {CA}: restore a backup"),
                 ("auth/client.crt", lambda data: self.read("auth/alt-client.crt").encode(),
                  f"auth/client.crt does not verify with {CA}: its CA is another"),
                 ("auth/server.crt", lambda data: None, "auth/server.crt is missing: make renew"),
                 (LAPTOP7 + ".crt", lambda data: b"junk", f"{LAPTOP7}.crt cannot be read: make renew"),
                 (DB1 + ".crt", lambda data: self.read("auth/server.crt").encode(), f"{DB1}.crt and its request differ: key")],
                [(None, None, well[0]), (None, None, well[1]), (None, None, well[2]), (LAPTOP7 + ".req", lambda data: None, well[5]),
                 ("auth/server.req", lambda data: self.read(DB1 + ".req").encode(), "auth/server.req is a request for db1.internal, not example.com"),
                 (None, None, "laptop7 (client) has no request: restore it, or make revoke NAME=laptop7")],
                [*((None, None, line) for line in well), (CA_KEY, lambda data: b"", f"{CA_KEY} is missing, or cannot be read: restore a backup")],
                [(CRL, lambda data: None, f"{CRL} is lost: copy the newest here from a server, or else those it lists get in again; "
                  "if no server has a newer one, delete auth/test-ca/crlnumber")]]:
            names = [name for name, _, _ in damages if name]
            good = {name: self.read(name) for name in names}
            changed = {name: change(good[name].encode()) for name, change, _ in damages if name}
            for name in names:
                self.change(name, lambda data, name=name: changed[name])
            self.assertEqual(check(), [line for *_, line in damages])
            for name in names:
                with open(self.path(name), "w", encoding="utf-8") as file:
                    file.write(good[name])
        self.assertEqual(check(status=0), well)
        self.make("revoke", "NAME=laptop7")
        well.remove(LAPTOP7 + ".crt until valid")
        self.assertEqual(check(status=0), well)
        self.make("renew", "DAYS=20", "CRL_DAYS=20")
        self.assertEqual(check(), [line.replace("valid", "expires soon") if line != well[0] else line for line in well])

    def test_a_certificate_that_is_no_good_is_made_again_when_it_is_asked_for(self):
        good = self.read(LAPTOP7 + ".crt")
        for bad in "junk", self.read("auth/client.crt"), self.read("auth/alt-client.crt"):
            self.change(LAPTOP7 + ".crt", lambda data, bad=bad: bad.encode())
            self.make("client-cert", "NAME=laptop7")
            self.verify(LAPTOP7 + ".crt", "-purpose", "sslclient")
            self.assertNotEqual(self.read(LAPTOP7 + ".crt"), good)
        self.change(LAPTOP7 + ".req", lambda data: b"junk")
        self.assertIn(f"{LAPTOP7}.req is damaged, not in PEM form, or not signed by its own key\n", self.make("client-cert", "NAME=laptop7", status=2))


if __name__ == "__main__":
    unittest.main()
