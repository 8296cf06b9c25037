"""Other people's TLS: each program as client and as server, let in and turned away."""

import contextlib
import glob
import os
import re
import shutil
import socket
import subprocess
import unittest

from support import (ACCEPTED, CA, CLIENT, CONNECTED, EXAMPLE, PATIENCE, PEER, SECOND_CA, SERVER, VERIFY, Process,
                     Project, Server, TestCase, client, connection, readme, wait_until)

ALT_CLIENT = ("auth/alt-client.crt", CLIENT[1])
NODE_CLIENT = """
const fs = require("fs"), tls = require("tls"), [port, ca, cert, key] = process.argv.slice(1);
const socket = tls.connect({port, host: "127.0.0.1", servername: "example.com", ca: fs.readFileSync(ca),
    cert: fs.readFileSync(cert), key: fs.readFileSync(key)}, () => socket.write("41\\n"));
socket.on("data", data => { process.stdout.write(data); socket.end(); });
socket.on("error", error => { console.error(error.message); process.exitCode = 1; });
"""
NODE_SERVER = """
const fs = require("fs"), tls = require("tls"), [port, ca, cert, key] = process.argv.slice(1);
const server = tls.createServer({ca: fs.readFileSync(ca), cert: fs.readFileSync(cert), key: fs.readFileSync(key),
    requestCert: true, rejectUnauthorized: true, minVersion: "TLSv1.3"},
    socket => { socket.on("error", () => {}); socket.on("data", data => socket.write(Number(data) + 1 + "\\n")); });
server.on("tlsClientError", error => console.error(error.message));
server.listen(port, "127.0.0.1");
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def listens(process, port):
    """Tell whether anybody listens on a port, without connecting to it where that can be seen; fail if the process has ended."""
    if process.process.poll() is not None:
        raise AssertionError(process.log())
    if not os.path.exists("/proc/net/tcp"):
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()
            return True
    for table in glob.glob("/proc/net/tcp*"):
        with open(table) as file:
            if re.search(rf":{port:04X} \S+ 0A ", file.read()):
                return True
    return False


class TheirClients(TestCase):
    """server_try with clients that are not ours."""

    def check(self, program, command, reason="self.signed certificate in certificate chain"):
        """Run a client that gets 41 from its standard input; once let in, once turned away for a reason."""
        if not shutil.which(program):
            self.skipTest(f"{program} is not installed")
        with Server() as server:
            for (cert, key), served in (CLIENT, True), (ALT_CLIENT, False):
                with subprocess.Popen(command(server.port, cert, key), cwd=Project.get(), stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
                    with contextlib.suppress(BrokenPipeError):
                        process.stdin.write(b"41\n")
                        process.stdin.flush()
                    said = b""
                    if served:
                        while not re.search(rb"(?m)^42\r?$", said):
                            part = process.stdout.read1(1000)
                            self.assertTrue(part, said)
                            said += part
                        server.wait_for(ACCEPTED % EXAMPLE % "Client")
                    else:
                        server.wait_for(PEER + VERIFY + reason)
                    with contextlib.suppress(BrokenPipeError):
                        process.stdin.close()
                    process.stdin = None  # communicate() would close it again
                    try:
                        said += process.communicate(timeout=PATIENCE)[0]
                    finally:
                        process.kill()
                    self.assertEqual(served, bool(re.search(rb"(?m)^42\r?$", said)), said)
            server.wait_for(PEER + "answered 1, done")

    def test_openssl(self):
        self.check("openssl", lambda port, cert, key: [
            "openssl", "s_client", "-quiet", "-no_ign_eof", "-connect", f"127.0.0.1:{port}", "-servername", "example.com",
            "-verify_return_error", "-CAfile", CA, "-cert", cert, "-key", key],
            "unable to get local issuer certificate")  # of the file, s_client sends the first certificate alone

    def test_openssl_with_odd_options(self):
        """Other groups, ciphers and signatures, records split and small, no server name, extensions that mean nothing here."""
        with Server() as server:
            for options in [["-groups", "P-256"], ["-groups", "X25519:P-256"], ["-split_send_frag", "512"], ["-noservername"],
                            ["-ciphersuites", "TLS_CHACHA20_POLY1305_SHA256"], ["-crlf"], ["-max_send_frag", "512"], ["-no_ticket"],
                            ["-sigalgs", "ECDSA+SHA256"], ["-alpn", "h2"], ["-status"]]:
                with self.subTest(options):
                    with subprocess.Popen(["openssl", "s_client", "-quiet", "-connect", f"127.0.0.1:{server.port}", "-CAfile", CA,
                                           "-verify_return_error", "-cert", CLIENT[0], "-key", CLIENT[1], *options], cwd=Project.get(),
                                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
                        process.stdin.write(b"41\n")
                        process.stdin.flush()
                        self.assertEqual(process.stdout.readline(), b"42\n")
                        process.kill()

    def test_gnutls(self):
        self.check("gnutls-cli", lambda port, cert, key: [
            "gnutls-cli", "--verify-hostname", "example.com", "--x509cafile", CA, "--x509certfile", cert, "--x509keyfile", key,
            "-p", str(port), "127.0.0.1"])

    def test_node(self):
        self.check("node", lambda port, cert, key: ["node", "-e", NODE_CLIENT, str(port), CA, cert, key])

    def test_socat(self):
        self.check("socat", lambda port, cert, key: [
            "socat", "-t5", "-", f"openssl:127.0.0.1:{port},cafile={CA},cert={cert},key={key},commonname=example.com,snihost=example.com"])


class TheirServers(TestCase):
    """client_try with servers that are not ours."""

    def check(self, program, command, reply, refusal):
        """Run a server; our client is let in, and turned away with another CA's certificate."""
        if not shutil.which(program):
            self.skipTest(f"{program} is not installed")
        port = free_port()
        with Process(*command(port)) as server:
            wait_until(lambda: listens(server, port))
            status, output, errors = client(port)
            self.assertEqual((status, output), (0, reply), errors + server.log())
            self.assertLine(errors, CONNECTED % rf"127\.0\.0\.1:{port}" + "\nsent 41\n")
            self.assertRefused(client(port, files=(CA, *ALT_CLIENT)), refusal)
            self.assertRefused(client(port, files=("auth/alt-ca/alt-ca.cert", *ALT_CLIENT)), SECOND_CA)

    def test_openssl(self):
        self.check("openssl", lambda port: [
            "openssl", "s_server", "-quiet", "-rev", "-Verify", "1", "-verify_return_error", "-CAfile", CA, "-cert", SERVER[0],
            "-key", SERVER[1], "-accept", str(port)], "14\n", "turned us away: unknown ca")

    def test_gnutls(self):
        self.check("gnutls-serv", lambda port: [
            "gnutls-serv", "--echo", "--require-client-cert", "--verify-client-cert", "--x509cafile", CA, "--x509certfile", SERVER[0],
            "--x509keyfile", SERVER[1], "-p", str(port)], "41\n", "turned us away: (access denied|bad certificate|certificate unknown|unknown ca)")

    def test_node(self):
        self.check("node", lambda port: ["node", "-e", NODE_SERVER, str(port), CA, *SERVER], "42\n",
                   # Node.js sends no alert when it turns a client away.
                   "(hung up, no reply|hung up)")

    def test_socat(self):
        self.check("socat", lambda port: [
            "socat", f"openssl-listen:{port},bind=127.0.0.1,reuseaddr,fork,cafile={CA},cert={SERVER[0]},key={SERVER[1]},verify=1",
            "exec:cat"], "41\n", "turned us away: unknown ca")


class LoadBalancer(TestCase):
    """The README's HAProxy configuration in front of two servers."""

    def test_haproxy(self):
        haproxy = shutil.which("haproxy", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
        if not haproxy:
            self.skipTest("haproxy is not installed")
        config = re.search(r"(?s)^```\n(defaults\n.*?)^```$", readme("auth"), re.M).group(1)
        port = free_port()
        with Server() as one, Server() as two:
            for name, number in ("6420", port), ("6421", one.port), ("6422", two.port):
                config = config.replace(name, str(number))
            path = os.path.join(Project.get(), "haproxy.cfg")
            with open(path, "w") as file:
                file.write(config)
            with Process(haproxy, "-f", path, "-db") as balancer:
                wait_until(lambda: listens(balancer, port))
                for _ in range(6):
                    self.ask(port)
                for server in one, two:
                    server.wait_for(PEER + "answered 1, done")
                self.assertEqual(one.stop(), 0)
                for _ in range(20):
                    self.ask(port)

    def ask(self, port):
        with connection(port) as tls:
            tls.sendall(b"41\n")
            self.assertEqual(tls.recv(100), b"42\n")
            tls.unwrap().close()


if __name__ == "__main__":
    unittest.main()
