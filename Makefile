# Certificates, demo and tests. `make` lists what there is to make.

OPENSSL = openssl
PYTHON = python3
NEWKEY = rsa:2048
SERIAL = 1111
CA_DAYS = 365
DAYS = 30
CRL_DAYS = 30
PORT = 6420

ORGANIZATION = /C=NZ/ST=Waikato/L=Hamilton/O=MegaCorp Inc
CA_SUBJECT = $(ORGANIZATION)/OU=Trust Me/CN=example.com/emailAddress=postmaster@example.com
CLIENT_SUBJECT = $(ORGANIZATION)/OU=Client/CN=$(CN)
SERVER_SUBJECT = $(ORGANIZATION)/OU=Server/CN=$(CN)

.PHONY: FORCE help certs alt-certs odd-certs server-cert client-cert check-name renew revoke crl demo test bench clean
.DELETE_ON_ERROR:
# Two `openssl ca` at once would take the same serial number.
.NOTPARALLEL:

help:
	@echo 'make certs                          a CA, and the certificates of a server and a client'
	@echo 'make alt-certs                      a second CA, which signs the same requests'
	@echo 'make server-cert NAME=db1.internal  the certificate of another server'
	@echo 'make client-cert NAME=laptop7       the certificate of another client'
	@echo 'make odd-certs                      expired, not yet valid, self-signed: to be turned away'
	@echo 'make renew                          new certificates for the same keys'
	@echo 'make revoke NAME=laptop7            revoke its certificates, and make a new CRL'
	@echo 'make crl                            a new CRL, before the old one expires'
	@echo 'make demo                           watch a server and a client talk (PORT=$(PORT))'
	@echo 'make test                           run the tests'
	@echo 'make bench                          measure what connections cost, here and elsewhere'
	@echo 'make clean                          remove everything made'

certs: auth/test-ca/test-ca.cert auth/client.key auth/client.req auth/client.crt \
    auth/server.key auth/server.req auth/server.crt
alt-certs: auth/alt-client.crt auth/alt-server.crt

# A CA: its records, its key, and the certificate that it gives itself. (One run makes both
# targets: "Pattern Intro" in the manual of GNU make.)
%-ca.key %-ca.cert:
	mkdir -p $(@D)/new_certs
	: > $(@D)/index.txt
	echo $(SERIAL) > $(@D)/serial
	(umask 077; $(OPENSSL) req -config auth/test-ca.conf -new -x509 -extensions ca_cert \
	    -subj "$(CA_SUBJECT)" \
	    -newkey $(NEWKEY) -nodes -days $(CA_DAYS) -keyout $*-ca.key -out $*-ca.cert)
	chmod a+r $*-ca.cert

# A key, and the request for its certificate.
auth/%.key auth/%.req:
	(umask 077; $(OPENSSL) req -config auth/test-ca.conf -new \
	    -subj "$(SUBJECT)" \
	    -newkey $(NEWKEY) -nodes -keyout auth/$*.key -out auth/$*.req)

# A certificate: the request, signed by a CA, which says what it is good for. The CA's own goes
# along: OpenSSL would otherwise look for it, and verify it, anew for each handshake.
auth/%.crt: auth/%.req auth/test-ca/test-ca.cert
	$(SIGN)
auth/alt-client.crt auth/alt-server.crt: auth/alt-%.crt: auth/%.req auth/alt-ca/alt-ca.cert
	$(SIGN)

define SIGN
CA=$(CA) SAN="$(SAN)" $(OPENSSL) ca -config auth/test-ca.conf -batch \
	    -cert auth/$(CA)/$(CA).cert -keyfile auth/$(CA)/$(CA).key \
	    -extensions $(EXTENSIONS) -in $< $(DATES) -out $@
cat auth/$(CA)/$(CA).cert >> $@
endef
CA = test-ca
DATES = -days $(DAYS)
auth/alt-%.crt: CA = alt-ca

# Certificates that must not get anybody in: for the README's experiments.
odd-certs: auth/expired-client.crt auth/expired-server.crt auth/future-client.crt auth/future-server.crt \
    auth/self-signed.crt
auth/expired-client.crt auth/expired-server.crt: auth/expired-%.crt: auth/%.req auth/test-ca/test-ca.cert
	$(SIGN)
auth/future-client.crt auth/future-server.crt: auth/future-%.crt: auth/%.req auth/test-ca/test-ca.cert
	$(SIGN)
auth/expired-%.crt: DATES = -startdate 20200101000000Z -enddate 20200131000000Z
auth/future-%.crt: DATES = -startdate 20480101000000Z -enddate 20480131000000Z
auth/self-signed.crt: auth/client.key
	$(OPENSSL) req -config auth/test-ca.conf -new -x509 -extensions client_cert -days $(DAYS) \
	    -subj "$(CLIENT_SUBJECT)" -key $< -out $@

# What a certificate says depends on whose it is: a name, DNS or IP, unless it is one of the pair's.
CN = $*
SAN = $(shell case '$*' in (*:*) echo IP;; (*[!0-9.]*) echo DNS;; (*) echo IP;; esac):$*
auth/client.% auth/server.% auth/self-signed.crt: CN = example.com
auth/client.% auth/%-client.crt: SAN = DNS:example.com
auth/server.% auth/%-server.crt: SAN = DNS:example.com, DNS:localhost, IP:127.0.0.1
auth/client.% auth/self-signed.crt client-cert: SUBJECT = $(CLIENT_SUBJECT)
auth/client.% auth/%-client.crt client-cert: EXTENSIONS = client_cert
auth/server.% server-cert: SUBJECT = $(SERVER_SUBJECT)
auth/server.% auth/%-server.crt server-cert: EXTENSIONS = server_cert

FILE = auth/$(subst :,\:,$(NAME))
server-cert client-cert: check-name $(FILE).key $(FILE).req $(FILE).crt
	$(OPENSSL) verify -x509_strict -purpose ssl$(@:-cert=) -CAfile auth/test-ca/test-ca.cert 'auth/$(NAME).crt'
	@echo 'For $(NAME): auth/$(NAME).crt, auth/$(NAME).key and auth/test-ca/test-ca.cert'
check-name: export NAME := $(NAME)
check-name:
	@case "$$NAME" in \
	'' | [-.:]* | *[!A-Za-z0-9.:_-]*) echo 'say whose: NAME=db1.internal, or NAME=192.0.2.7'; exit 1;; \
	client | server | *-client | *-server | self-signed) echo "NAME=$$NAME is taken: choose another"; exit 1;; \
	esac

# -W makes a request look new. The keys are not needed: they may be on their machines.
renew:
	@test -f auth/test-ca/test-ca.cert || { echo 'nothing to renew: make certs comes first'; exit 1; }
	@for crt in auth/*.crt; do \
	    name=$${crt#auth/}; name=$${name%.crt}; \
	    case $$name in \
	    client | *-client) role=client;; \
	    server | *-server) role=server;; \
	    *) $(OPENSSL) x509 -in "./$$crt" -noout -purpose | grep -q 'SSL server : Yes' && role=server || role=client;; \
	    esac; \
	    test -f "auth/$${name#alt-}.req" || { echo "$$crt: no request, not renewed"; continue; }; \
	    $(MAKE) -W "auth/$${name#alt-}.req" EXTENSIONS=$${role}_cert "$$crt" || exit; \
	done

# Every certificate ever issued to this subject: an older one serves a thief as well. The subject is
# looked up in the CA's records, by serial number. The request goes, so that `make renew` passes the
# certificate over, and a new one is for a new key.
revoke:
	@case '$(NAME)' in client | server) ;; *) $(MAKE) -s check-name NAME='$(NAME)';; esac
	@test -f 'auth/$(NAME).crt' || { echo 'auth/$(NAME).crt: no such certificate'; exit 1; }
	@serial=$$($(OPENSSL) x509 -noout -serial -in './auth/$(NAME).crt') || exit; \
	serials=$$(awk -F '\t' -v serial="$${serial#serial=}" \
	    'NR == FNR {if ($$4 == serial) subject = $$6; next} \
	    $$6 == subject {found = 1; if ($$1 == "V") print $$4} END {exit !found}' \
	    auth/test-ca/index.txt auth/test-ca/index.txt) || { echo 'auth/$(NAME).crt: not of this CA'; exit 1; }; \
	for serial in $$serials; do \
	    echo "$(CA_COMMAND) -revoke auth/test-ca/new_certs/$$serial.pem"; \
	    $(CA_COMMAND) -revoke auth/test-ca/new_certs/$$serial.pem || exit; \
	done
	rm -f 'auth/$(NAME).req'
	@$(MAKE) crl
crl: auth/test-ca/test-ca.crl
auth/test-ca/test-ca.crl: FORCE
	@test -f auth/test-ca/test-ca.key || { echo 'no CA here: make certs comes first'; exit 1; }
	test -f auth/test-ca/crlnumber || echo 01 > auth/test-ca/crlnumber
	$(CA_COMMAND) -gencrl -crldays $(CRL_DAYS) -out $@
FORCE:
CA_COMMAND = $(OPENSSL) ca -config auth/test-ca.conf -cert auth/test-ca/test-ca.cert -keyfile auth/test-ca/test-ca.key

# The server's log comes through a pipe: its first line says where it listens, or why not.
demo: certs
	@rm -f auth/demo; mkfifo auth/demo; trap 'rm -f auth/demo' EXIT; trap 'exit 130' INT TERM; \
	./server_try --port $(PORT) auth/test-ca/test-ca.cert auth/server.crt auth/server.key 2> auth/demo & \
	server=$$!; \
	{ \
	    read -r line; echo "server: $$line"; \
	    case $$line in 'listening on '*) ;; *) sed 's/^/server: /'; echo 'make demo PORT=0 takes any free port'; exit 1;; esac; \
	    read -r expiry; echo "server: $$expiry"; \
	    client=$$(./client_try --port "$${line##*:}" \
	        auth/test-ca/test-ca.cert auth/client.crt auth/client.key 2>&1); status=$$?; \
	    echo "$$client" | sed 's/^/client: /'; \
	    kill $$server; sed 's/^/server: /'; \
	} < auth/demo; \
	wait $$server && exit $$status

test:
	$(PYTHON) tests

bench: certs
	$(PYTHON) tests/bench.py

clean:
	rm -rf auth/test-ca auth/alt-ca tests/__pycache__
	rm -f auth/demo auth/*.key auth/*.req auth/*.crt
