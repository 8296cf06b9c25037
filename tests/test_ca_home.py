"""The CA's home: what make's server-cert, client-cert, renew, revoke, crl, list, check and clean do."""

import glob
import os
import re
import shutil
import subprocess
import time
import unittest

from support import (ACCEPTED, ALL, CA, EXAMPLE, PATIENCE, Home, Server, client, make, make_command, plain_environment,
                     run, template, temporary_folder)

CRL = "auth/test-ca/test-ca.crl"
CA_KEY = "auth/test-ca/test-ca.key"
DB1 = "auth/servers/db1.internal"
LAPTOP7 = "auth/clients/laptop7"


class Names(Home):
    commands = ("client-cert NAME=laptop7",)

    def test_each_kind_of_name_gets_a_certificate_for_its_role_once(self):
        for role, name, shown in [("server", "db1.internal", "DNS:db1.internal"), ("client", "db1.internal", "DNS:db1.internal"),
                                  ("server", "192.0.2.7", "IP Address:192.0.2.7"), ("client", "build-server", "DNS:build-server"),
                                  ("server", "2001:db8::1", "IP Address:2001:DB8:0:0:0:0:0:1")]:
            file = f"auth/{role}s/{name}"
            self.assertIn(f"For {name}: {file}.crt, {file}.key and {CA}\n", self.make(f"{role}-cert", f"NAME={name}"))
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
        characters, dots = "only letters, digits and . : - _ are allowed", "no leading hyphen, nor leading, last or double dot"
        address, long = "not an IP address, and no port belongs here", "too long: %d characters are allowed, and 63 between two dots"
        for name, says in [("", "a name is missing: NAME=db1.internal, or an address, NAME=192.0.2.7"),
                           ("a b", characters), ("*.internal", characters), ("../x", characters), ("$(HOME)", characters), ("a'b;c", characters),
                           ("-x", dots), (".x", dots), ("db1.internal.", dots), ("a..b", dots),
                           ("a" * 64, long % 64), ("a" * 60 + ".bcde", long % 64),
                           ("999.1.1.1", address), ("::zz", address), ("host:8080", address)]:
            said = self.make("server-cert", f"NAME={name.replace('$', '$$')}", status=2)
            self.assertEqual(said.splitlines()[0], f"NAME={name}: {says}")
        for names, says in ("a,b", characters), ("one ::zz", address), ("b" * 64, long % 253):
            said = self.make("client-cert", "NAME=fine", f"NAMES={names}", status=2)
            self.assertEqual(said.splitlines()[0], f"NAMES={names.split()[-1]}: {says}")
        self.assertEqual(self.listing(), before)

    def test_settings_in_the_environment_do_not_count(self):
        environment = dict(plain_environment(), NAME="laptop7", NAMES="x", SERIAL="1111", FORCE="yes")
        for goal, says in [("revoke", "either NAME=laptop7, for all its certificates, or SERIAL=111D, for one"),
                           ("server-cert", "a name is missing"), ("clean", "in use")]:
            self.assertIn(says, self.make(goal, environment=environment, status=2))
        self.assertEqual([row[0] for row in self.index()], ["V"])
        self.assertTrue(os.path.exists(self.path(LAPTOP7 + ".req")))

    def test_a_companys_name_comes_out_whole_or_is_refused(self):
        self.make("client-cert", "NAME=pc0", r"ORGANIZATION=/C=NZ/L=Köln/O=Müller & Söhne/O=A\+B Ltd/O=A\/B Ltd/OU=Warning Not After : Up Date: X")
        text = self.openssl("x509", "-in", "auth/clients/pc0.crt", "-noout", "-subject", "-nameopt", "sep_comma_plus,utf8")
        self.assertIn("C=NZ,L=Köln,O=Müller & Söhne,O=A+B Ltd,O=A/B Ltd,OU=Warning Not After : Up Date: X,OU=Client,CN=pc0", text.replace(" = ", "="))
        self.make("renew")
        self.assertNotIn("arning", self.make("check"))
        for name in "/O=A+B Ltd", "/O=A/B Ltd", "/DC=example/O=x", "/street=x", "O=x", "/O=x/C=NZ", "/O=":
            self.assertEqual(self.make("client-cert", "NAME=pc9", f"ORGANIZATION={name}", status=2).splitlines()[0],
                             f"ORGANIZATION={name}: /C=, /ST=, /L=, /O=, /OU= are allowed, in this order; write \\+ for +, "
                             '\\/ for /, and none of $ ` "')
        self.assertFalse(os.path.exists(self.path("auth/clients/pc9.key")))

    def test_days_that_are_none_are_refused(self):
        for setting in "DAYS=x", "DAYS=0", "CRL_DAYS=":
            self.assertEqual(self.make("renew", setting, status=2).splitlines()[0], f"{setting}: not a number of days")

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
                         [LAPTOP7 + ".crt until valid", DB1 + ".crt until valid", CRL + " valid 30 days: copy it to its users; servers need SIGHUP",
                          "Copy each .crt to its machine; servers need SIGHUP."])
        self.assertEqual(self.openssl(*what), before)
        self.assertNotEqual(self.openssl("x509", "-noout", "-serial", "-in", DB1 + ".crt"), serial)
        self.assertNotEqual(self.openssl("crl", "-noout", "-crlnumber", "-in", CRL), number)
        self.assertIn(f"For db1.internal: {DB1}.crt and {CA}\n", self.make("server-cert", "NAME=db1.internal"))
        self.assertFalse(os.path.exists(self.path(DB1 + ".key")))

    def test_the_same_names_again_are_no_error_and_others_are(self):
        self.make("server-cert", "NAME=db1.internal", "NAMES=10.0.0.7 fd00::7 db1")
        self.assertIn("has other names: revoke db1.internal before", self.make("server-cert", "NAME=db1.internal", "NAMES=db2", status=2))
        name, long = "a" * 63, ".".join(["a" * 63] * 3 + ["a" * 61])
        self.make("server-cert", f"NAME={name}", f"NAMES={name}.b")
        self.make("server-cert", "NAME=" + "a" * 62 + ".b", f"NAMES={long}")
        self.assertIn("DNS:" + long, self.openssl("x509", "-in", "auth/servers/" + "a" * 62 + ".b.crt", "-noout", "-text"))

    def test_a_request_that_came_from_another_ca_can_be_given_up(self):
        shutil.rmtree(self.path("auth/test-ca"))
        other = "server-cert", "NAME=db1.internal", "NAMES=db2"
        self.assertIn("has other names: revoke db1.internal before", self.make(*other, status=2))
        self.assertIn("revoked no certificate, but deleted the request\n", self.make("revoke", "NAME=db1.internal"))
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

    def test_openssl_says_itself_what_only_it_knows(self):
        os.remove(self.path(CA_KEY))
        self.assertRegex(self.make("renew", status=2), f"{DB1}.crt NOT renewed: openssl ca: (?s:.*){CA_KEY}")

    def test_a_list_that_would_forget_somebody_is_not_put_in_its_place(self):
        """An openssl that makes the list as it was before."""
        shutil.copy(self.path(CRL), self.path("before"))
        openssl = self.false_openssl(f'case "$*" in *-gencrl*) cp before {CRL}.new; exit;; esac\nexec openssl "$@"\n')
        said = self.make("revoke", "NAME=laptop7", openssl, status=2)
        self.assertEqual(said.splitlines()[0], f"{CRL}: a new one would not list all that is revoked; the old one is kept")
        self.make("crl")
        self.assertEqual(self.revoked(), ["1112"])

    def test_renewal_without_a_ca_is_refused(self):
        shutil.rmtree(self.path("auth/test-ca"))
        for goal in "renew", "crl", "list", "check":
            self.assertEqual(self.make(goal, status=2).splitlines()[0], "no CA here: run make certs first")

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
        self.assertEqual([row[3] for row in self.index()], [f"{0x1111 + number:X}" for number in range(6)])

    @unittest.skipUnless(shutil.which("faketime"), "faketime is not installed")
    def test_a_slow_clock_changes_nothing(self):
        def state():
            return {name: os.stat(self.path(name)).st_mtime_ns for name in self.listing()}
        before = state()
        for arguments in ["renew"], ["crl"], ["client-cert", "NAME=laptop8"], ["check"]:
            done = self.at_another_time("-30d", *arguments)
            self.assertEqual(done.returncode, 2)
            self.assertEqual(done.stdout.decode().splitlines()[0], f"the clock is wrong, so nothing is done: {CA} begins later than now")
            self.assertEqual(state(), before)
        self.at_another_time("+30d", "client-cert", "NAME=laptop8")
        self.assertEqual(self.make("renew", status=2).splitlines()[0],
                         "the clock is wrong, so nothing is done: auth/clients/laptop8.crt begins later than now")

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
        for arguments in ["client-cert", "NAME=laptop7"], ["renew"]:
            self.assertRegex(self.make(*arguments, "DAYS=400"), f"{CA} ends before what it signs, which is of no use after that: see make list\n")

    def test_a_lost_ca_certificate_is_not_replaced(self):
        before = self.read("auth/test-ca/test-ca.key")
        for lost in "test-ca.cert", "index.txt", "new_certs/*":
            for name in glob.glob(os.path.join(glob.escape(self.path("auth/test-ca")), lost)):
                os.remove(name)
            for arguments in ["certs"], ["server-cert", "NAME=db9"]:
                self.assertIn(f"{CA} is missing, and has signed certificates: restore a back-up\n", self.make(*arguments, status=2))
        self.assertEqual(self.read("auth/test-ca/test-ca.key"), before)

    def test_all_that_a_machine_ever_had_is_revoked_and_nothing_else(self):
        for arguments in ["client-cert", "NAME=laptop70"], ["server-cert", "NAME=laptop7"], ["renew"]:
            self.make(*arguments, "ORGANIZATION=/O=Caf\u00e9")
        for name in "nobody", "", "a b", "../client", "aptop7":
            self.make("revoke", f"NAME={name}", status=2)
        self.assertEqual({row[0] for row in self.index()}, {"V"})
        for _ in range(2):
            serials = " ".join(row[3] for row in self.index() if row[5].endswith("/CN=laptop7"))
            self.assertEqual(self.make("revoke", "NAME=laptop7"),
                             f"{CRL} valid 30 days: copy it to its users; servers need SIGHUP\nrevoked {serials}\n")
            self.assertEqual([row[5].rpartition("=")[2] for row in self.index() if row[0] == "R"], ["laptop7"] * 4)
            self.change("auth/test-ca/index.txt", lambda data: re.sub(rb"(?m)^(R.*\t)\d+Z\t", rb"\g<1>200101000000Z\t", data))
        text = self.openssl("crl", "-in", CRL, "-noout", "-text")
        self.assertIn("Version 2", text)
        self.assertEqual(text.count("Revocation Date: Jan  1 00:00:00 2020 GMT"), 4)  # when it was first revoked
        self.assertNotIn("laptop7.crt", self.make("renew"))
        self.make("client-cert", "NAME=laptop7")  # with a new key
        self.assertEqual(len([row for row in self.index() if row[0] == "V" and row[5].endswith("/CN=laptop7")]), 1)

    def test_one_certificate_is_revoked_by_its_serial_number(self):
        self.make("renew")
        self.assertIn("revoked 1111\n", self.make("revoke", "SERIAL=1111"))
        self.assertEqual(self.revoked(), ["1111"])
        self.assertTrue(os.path.exists(self.path(DB1 + ".req")))
        self.verify(DB1 + ".crt", "-crl_check", "-CRLfile", CRL)
        self.verify("auth/test-ca/new_certs/1111.pem", "-crl_check", "-CRLfile", CRL, status=2)
        self.assertIn("99: this CA has issued no such certificate", self.make("revoke", "SERIAL=99", status=2))
        self.assertEqual(self.make("revoke", "SERIAL=1112", "NAME=laptop7", status=2).splitlines()[0],
                         "either NAME=laptop7, for all its certificates, or SERIAL=111D, for one")
        self.assertEqual(self.revoked(), ["1111"])
        self.make("revoke", "SERIAL=1113")
        self.assertEqual(self.revoked(), ["1111", "1113"])
        self.make("client-cert", "NAME=laptop7")  # which hands out no certificate that is revoked
        self.verify(LAPTOP7 + ".crt", "-crl_check", "-CRLfile", CRL)

    def test_the_list_has_a_line_a_machine(self):
        self.make("renew")
        self.make("revoke", "NAME=laptop7")
        self.make("server-cert", "NAME=db2", "DAYS=3")
        self.make("certs")
        self.make("crl", "CRL_DAYS=3")
        self.assertEqual([re.sub(r"until \w+ .* GMT", "until", line) for line in self.make("list").splitlines()],
                         [f"{CA} CA until valid", "db1.internal server 1114 until valid", "db2 server 1115 until expires soon",
                          "example.com client 1116 until valid", "example.com server 1117 until valid",
                          "laptop7 client 1113 revoked", f"{CRL} CRL 04 until expires soon"])

    def test_a_name_that_cannot_be_printed_is_escaped(self):
        self.change("auth/test-ca/index.txt", lambda data: data.replace(b"CN=laptop7", b"CN=laptop\xff"))
        self.assertIn("laptop\\udcff client 1112 until", self.make("list"))

    def test_a_list_of_a_thousand_certificates_needs_few_calls_of_openssl(self):
        row = self.index()[0]
        rows = ["\t".join([*row[:3], f"{serial:X}", *row[4:]]) + "\n" for serial in range(0x2000, 0x2000 + 1000)]
        self.change("auth/test-ca/index.txt", lambda data: data + "".join(rows).encode())
        self.change("auth/test-ca/serial", lambda data: b"23E8\n")
        lines = self.make("list", self.false_openssl('echo >> calls\nexec openssl "$@"\n')).splitlines()
        self.assertEqual(len(lines), 4, lines)
        self.assertRegex("\n".join(lines), "(?m)^db1.internal server 23E7 until .* valid$")
        self.assertLess(os.path.getsize(self.path("calls")), 12)

    def test_no_ca_that_the_system_trusts_is_taken_for_ours(self):
        other = os.path.join(temporary_folder(), "other")
        shutil.copytree(self.folder, other)
        shutil.rmtree(os.path.join(other, "auth/test-ca"))
        make(other, "server-cert", "NAME=db1.internal", "CA_SUBJECT=/CN=Other")
        shutil.copy(os.path.join(other, DB1 + ".crt"), self.path(DB1 + ".crt"))
        os.mkdir(self.path("system"))
        its = os.path.join(other, CA)
        shutil.copy(its, self.path(f"system/{self.openssl('x509', '-noout', '-hash', '-in', its).strip()}.0"))
        said = self.make("check", environment=dict(plain_environment(), SSL_CERT_DIR=self.path("system")), status=2)
        self.assertIn(f"{DB1}.crt is not for a server, or not signed by {CA}, or one has expired\n", said)

    def test_clean_spares_a_ca_that_is_in_use_whatever_is_left_of_it(self):
        self.assertRegex(self.make("clean", status=2), "in use by db1.internal laptop7: FORCE=yes deletes the CA anyway\n")
        for name in "servers", "clients":
            shutil.rmtree(self.path(f"auth/{name}"))
        self.assertIn("in use by db1.internal laptop7: ", self.make("clean", status=2))
        os.remove(self.path("auth/test-ca/index.txt"))
        self.assertIn("in use by db1.internal laptop7: ", self.make("clean", status=2))
        self.make("client-cert", "NAME=example.com")  # a name that the pair has, too
        shutil.rmtree(self.path("auth/test-ca"))
        self.assertIn("in use by example.com: ", self.make("clean", status=2))
        self.make("clean", "FORCE=yes")
        self.assertEqual(glob.glob(glob.escape(self.path("auth")) + "/*/"), [])


class Judged(Home):
    """A CA with two machines and the pair, and another CA."""

    commands = (ALL, *Machines.commands)

    def test_check_tells_what_is_wrong(self):
        def check(status=2):
            return [re.sub(r"until \w+ .* GMT", "until", line) for line in self.make("check", status=status).splitlines()
                    if not line.startswith("make: ")]
        well = [f"{name} until valid" for name in (CA, CRL, "auth/client.crt", "auth/server.crt", LAPTOP7 + ".crt", DB1 + ".crt")]
        self.assertEqual(check(status=0), well)
        for damages in [
                [(CA_KEY, lambda data: self.read("auth/alt-ca/alt-ca.key").encode(), f"{CA_KEY} is not the key of {CA}"),
                 (CRL, lambda data: None, f"{CRL} is missing, old, or does not list all that is revoked: make crl"),
                 ("auth/client.crt", lambda data: self.read("auth/alt-client.crt").encode(),
                  f"auth/client.crt is not for a client, or not signed by {CA}, or one has expired"),
                 ("auth/server.crt", lambda data: None, "auth/server.crt is missing, or cannot be read"),
                 (LAPTOP7 + ".crt", lambda data: b"junk", f"{LAPTOP7}.crt is missing, or cannot be read"),
                 (DB1 + ".crt", lambda data: self.read("auth/server.crt").encode(), f"{DB1}.crt and {DB1}.req differ: key")],
                [(None, None, well[0]),
                 ("auth/test-ca/index.txt", lambda data: re.sub(rb"(?m)^V(.*)\t(\t.*db1.internal)$", rb"R\1\t261126000000Z\2", data),
                  f"{CRL} is missing, old, or does not list all that is revoked: make crl"),
                 (None, None, well[2]),
                 ("auth/server.req", lambda data: self.read(DB1 + ".req").encode(), "auth/server.req is a request for db1.internal, not example.com"),
                 (LAPTOP7 + ".req", lambda data: None, f"{DB1}.crt is revoked: make renew, or delete {DB1}.req"),
                 (None, None, "laptop7 (client) has no request: restore it, or make revoke NAME=laptop7")],
                [(CA_KEY, lambda data: b"", f"{CA_KEY} cannot be read")]]:
            names = [name for name, _, _ in damages if name]
            good = {name: self.read(name) for name in names}
            changed = {name: change(good[name].encode()) for name, change, _ in damages if name}
            for name in names:
                self.change(name, lambda data, name=name: changed[name])
            self.assertEqual(check(), [line for *_, line in damages])
            for name in names:
                with open(self.path(name), "w", encoding="utf-8") as file:
                    file.write(good[name])
        self.change("auth/test-ca/index.txt", lambda data: data + b"V\t380101000000Z\t\t20FF\tunknown\t/OU=Sales/CN=ann\n" +
                    b"V\t200101000000Z\t\t20FE\tunknown\t/OU=Server/CN=db0.internal\n")  # made by hand; expired long ago
        self.make("list")  # which repairs what has changed
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
        self.assertIn(f"{LAPTOP7}.req is missing, or cannot be read\n", self.make("client-cert", "NAME=laptop7", status=2))


if __name__ == "__main__":
    unittest.main()
