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
SERVER_NAMES = DNS:example.com, DNS:localhost, IP:127.0.0.1
CA = auth/test-ca/test-ca

# A CA: its records, its key, and the certificate that it gives itself.
$(CA).cert:
	@test -z "`cat auth/test-ca/index.txt $(CA).crl auth/test-ca/new_certs/* 2> /dev/null | head -n 1`" || \
	    { echo '$@ is missing, and has signed certificates: restore a back-up'; exit 1; }
	mkdir -p auth/test-ca/new_certs
	touch auth/test-ca/index.txt
	echo unique_subject = no > auth/test-ca/index.txt.attr
	echo $(SERIAL) > auth/test-ca/serial
	echo 01 > auth/test-ca/crlnumber
	$(call run,$(OPENSSL) req -config auth/test-ca.conf -new -x509 -extensions ca_cert -subj "$(CA_SUBJECT)" \
	    -newkey $(NEWKEY) -nodes -days $(CA_DAYS) -keyout $(CA).key -out $@)

# For each end a key, and a request for a certificate, with the names that it is for.
auth/client.req:
	$(call run,$(OPENSSL) req -config auth/test-ca.conf -new -subj "$(ORGANIZATION)/OU=Client/CN=example.com" \
	    -addext "subjectAltName = DNS:example.com" -newkey $(NEWKEY) -nodes -keyout auth/client.key -out $@)
auth/server.req:
	$(call run,$(OPENSSL) req -config auth/test-ca.conf -new -subj "$(ORGANIZATION)/OU=Server/CN=example.com" \
	    -addext "subjectAltName = $(SERVER_NAMES)" -newkey $(NEWKEY) -nodes -keyout auth/server.key -out $@)

# The certificate: the request, signed by the CA, which says what it is good for. The CA's own goes
# along: OpenSSL would otherwise look for it, and verify it, anew for each handshake.
auth/client.crt: auth/client.req $(CA).cert
	$(call run,$(OPENSSL) ca -config auth/test-ca.conf -cert $(CA).cert -keyfile $(CA).key -batch \
	    -extensions client_cert -in auth/client.req -days $(DAYS) -out $@)
	@cat $(CA).cert >> $@
auth/server.crt: auth/server.req $(CA).cert
	$(call run,$(OPENSSL) ca -config auth/test-ca.conf -cert $(CA).cert -keyfile $(CA).key -batch \
	    -extensions server_cert -in auth/server.req -days $(DAYS) -out $@)
	@cat $(CA).cert >> $@

# Show a command as it is typed, and run it with nobody else at the CA; it speaks only if it fails.
define run
@$(SHOW) '$(subst ','\'',$(1))'
@$(PYTHON) auth/machines run $(1) && chmod a+r $@
endef
SHOW = printf '%s\n'

.DEFAULT_GOAL := help
$(if $(filter 3.7% 3.80,$(MAKE_VERSION)),$(error GNU make 3.81 or later is needed; this is $(MAKE_VERSION)))
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help certs alt-certs odd-certs server-cert client-cert list check renew revoke crl
.PHONY: demo test bench clean fit-openssl

certs: $(CA).cert auth/client.req auth/server.req auth/client.crt auth/server.crt
	@$(PYTHON) auth/machines outlived
	@$(SHOW) 'Next: ./server_try $(CA).cert auth/server.crt auth/server.key' \
	    '      ./client_try $(CA).cert auth/client.crt auth/client.key   # in another terminal'

# Machines of one's own: auth/README.md has how, auth/machines does it. NAME, NAMES, SERIAL and FORCE
# count on make's command line alone, since some systems have a NAME in the environment.
given = $(if $(filter command,$(firstword $(origin $(1)))),$($(1)))
export GIVEN_NAME = $(call given,NAME)
export GIVEN_NAMES = $(call given,NAMES)
export GIVEN_SERIAL = $(call given,SERIAL)
export OPENSSL NEWKEY DAYS CRL_DAYS ORGANIZATION
server-cert client-cert: $(CA).cert
	@$(PYTHON) auth/machines certify $(@:-cert=)
list check renew revoke crl:
	@$(PYTHON) auth/machines $@

# For the README's experiments: a second CA, which signs the same requests, and certificates that
# must not get anybody in.
alt-certs: auth/alt-client.crt auth/alt-server.crt
odd-certs: auth/expired-client.crt auth/expired-server.crt auth/future-client.crt \
    auth/future-server.crt auth/self-signed.crt
auth/alt-ca/alt-ca.cert:
	mkdir -p auth/alt-ca/new_certs
	touch auth/alt-ca/index.txt
	echo $(SERIAL) > auth/alt-ca/serial
	$(call run,$(OPENSSL) req -config auth/test-ca.conf -new -x509 -extensions ca_cert -subj "$(CA_SUBJECT)" \
	    -newkey $(NEWKEY) -nodes -days $(CA_DAYS) -keyout auth/alt-ca/alt-ca.key -out $@)
auth/alt-%.crt: auth/%.req auth/alt-ca/alt-ca.cert
	$(call run,$(OPENSSL) ca -config auth/test-ca.conf -name CA_alt -cert auth/alt-ca/alt-ca.cert \
	    -keyfile auth/alt-ca/alt-ca.key -batch -extensions $*_cert -in $< -days $(DAYS) -out $@)
	@cat auth/alt-ca/alt-ca.cert >> $@
auth/expired-%.crt: auth/%.req $(CA).cert
	$(call run,$(OPENSSL) ca -config auth/test-ca.conf -cert $(CA).cert -keyfile $(CA).key -batch \
	    -extensions $*_cert -in $< -startdate 20200101000000Z -enddate 20200131000000Z -out $@)
	@cat $(CA).cert >> $@
auth/future-%.crt: auth/%.req $(CA).cert
	$(call run,$(OPENSSL) ca -config auth/test-ca.conf -cert $(CA).cert -keyfile $(CA).key -batch \
	    -extensions $*_cert -in $< -startdate 20480101000000Z -enddate 20480131000000Z -out $@)
	@cat $(CA).cert >> $@
auth/self-signed.crt: auth/client.req
	$(call run,$(OPENSSL) req -config auth/test-ca.conf -new -x509 -extensions client_cert -days $(DAYS) \
	    -subj "$(ORGANIZATION)/OU=Client/CN=example.com" -key auth/client.key -out $@)

demo:
	@for end in client server; do \
	    test ! -e auth/$$end.crt || $(OPENSSL) x509 -noout -checkend 60 -in auth/$$end.crt > /dev/null || \
	        { echo "renewing auth/$$end.crt, which has expired"; rm auth/$$end.crt; }; \
	done
	@$(MAKE) -s SHOW=: certs alt-certs
	@$(PYTHON) tests/demo $(PORT)

test:
	MAKE='$(MAKE)' $(PYTHON) tests

bench: certs
	$(PYTHON) tests/bench.py

clean:
	@test '$(call given,FORCE)' = yes || $(PYTHON) auth/machines in-use
	rm -rf auth/test-ca auth/alt-ca auth/clients auth/servers tests/__pycache__
	rm -f auth/*.key auth/*.req auth/*.crt

$(CA).cert auth/client.req auth/server.req: | fit-openssl
fit-openssl:
	@$(OPENSSL) req -help 2>&1 | grep -q -e -addext || \
	    { echo "OpenSSL 1.1.1 or later, or LibreSSL 3.3 or later, is needed; this is $$($(OPENSSL) version)"; exit 1; }

help:
	@echo 'make certs                          a CA, and the certificates of a server and a client'
	@echo 'make demo                           watch the two talk (PORT=$(PORT); 0 takes any free one)'
	@echo 'make alt-certs odd-certs            a second CA, and certificates that are turned away: to experiment'
	@echo 'make server-cert NAME=db1.internal  the certificate of another server, optionally NAMES="db1 10.0.0.7"'
	@echo 'make client-cert NAME=laptop7       the certificate of another client'
	@echo 'make list                           the newest certificate of each machine'
	@echo 'make check                          what is wrong, or ends soon; for cron'
	@echo 'make renew                          new certificates for the same requests, and a new CRL'
	@echo 'make revoke NAME=laptop7            revoke all its certificates (or SERIAL=111D, one); a new CRL'
	@echo 'make crl                            a new list of what is revoked (CRL)'
	@echo 'make test                           run the tests'
	@echo 'make bench                          measure what connections cost, here and with others'
	@echo 'make clean                          remove everything made'
