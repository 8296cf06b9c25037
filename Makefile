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
override CA = auth/test-ca/test-ca

# Make a CA: its records, its key, and its self-signed certificate.
$(CA).cert:
	$(call run,mkdir -p auth/test-ca/new_certs && touch auth/test-ca/index.txt && echo $(SERIAL) > auth/test-ca/serial && \
	    $(OPENSSL) req -config auth/test-ca.conf -new -x509 -utf8 -extensions ca_cert -subj "$(CA_SUBJECT)" \
	    -newkey $(NEWKEY) -nodes -days $(CA_DAYS) -keyout $(CA).key -out $@)

# Make a key for each end, and a request for a certificate with its names.
auth/client.req:
	$(call run,$(OPENSSL) req -config auth/test-ca.conf -new -utf8 -subj "$(ORGANIZATION)/OU=Client/CN=example.com" \
	    -addext "subjectAltName = DNS:example.com" -newkey $(NEWKEY) -nodes -keyout auth/client.key -out $@)
auth/server.req:
	$(call run,$(OPENSSL) req -config auth/test-ca.conf -new -utf8 -subj "$(ORGANIZATION)/OU=Server/CN=example.com" \
	    -addext "subjectAltName = $(SERVER_NAMES)" -newkey $(NEWKEY) -nodes -keyout auth/server.key -out $@)

# Issue the certificates; the CA, not the request, decides on the role. The CA's certificate is added,
# because OpenSSL would otherwise look it up and verify it again in each handshake.
auth/client.crt: auth/client.req $(CA).cert
	$(call run,$(OPENSSL) ca -config auth/test-ca.conf -cert $(CA).cert -keyfile $(CA).key -batch \
	    -extensions client_cert -in auth/client.req -days $(DAYS) -out $@ && cat $(CA).cert >> $@)
auth/server.crt: auth/server.req $(CA).cert
	$(call run,$(OPENSSL) ca -config auth/test-ca.conf -cert $(CA).cert -keyfile $(CA).key -batch \
	    -extensions server_cert -in auth/server.req -days $(DAYS) -out $@ && cat $(CA).cert >> $@)

# Show a command as one would type it, and run it under the CA's lock; its output is shown only if it
# fails, and until it is done the file that it makes ends in .new.
define run
@$(PYTHON) auth/machines run $@ '$(subst ','\'',$(1))'
endef

.DEFAULT_GOAL := help
$(if $(filter 3.7% 3.80,$(MAKE_VERSION)),$(error GNU make 3.81 or later is needed; this is $(MAKE_VERSION)))
.DELETE_ON_ERROR:
.PRECIOUS: $(CA).cert auth/client.req auth/server.req auth/client.crt auth/server.crt
.NOTPARALLEL:
.PHONY: help certs alt-certs odd-certs server-cert client-cert list check renew revoke crl
.PHONY: demo test bench clean fit-openssl

certs: $(CA).cert auth/client.req auth/server.req auth/client.crt auth/server.crt
	@test "$$QUIET" || printf '%s\n' 'Next: ./server_try $(CA).cert auth/server.crt auth/server.key' \
	    '      ./client_try $(CA).cert auth/client.crt auth/client.key   # in another terminal'

# Your own machines: auth/README.md explains how, auth/machines does it. NAME, NAMES and FORCE are read
# only from make's command line, since some systems have a NAME in the environment.
given = $(if $(filter command,$(firstword $(origin $(1)))),$($(1)))
export GIVEN_NAME = $(call given,NAME)
export GIVEN_NAMES = $(call given,NAMES)
export GIVEN_FORCE = $(call given,FORCE)
export OPENSSL NEWKEY DAYS CRL_DAYS CA_DAYS SERIAL ORGANIZATION CA_SUBJECT SERVER_NAMES QUIET PORT
QUIET =
server-cert client-cert: $(CA).cert
	@$(PYTHON) auth/machines certify $(@:-cert=)
list check renew revoke crl:
	@$(PYTHON) auth/machines $@

# For the README's experiments: a second CA, which signs the same requests, and certificates that
# must not get anybody in.
alt-certs: auth/alt-client.crt auth/alt-server.crt auth/alt-leaf.crt
odd-certs: auth/expired-client.crt auth/expired-server.crt auth/future-client.crt \
    auth/future-server.crt auth/self-signed.crt
auth/alt-ca/alt-ca.cert:
	$(call run,mkdir -p auth/alt-ca/new_certs && touch auth/alt-ca/index.txt && echo $(SERIAL) > auth/alt-ca/serial && \
	    $(OPENSSL) req -config auth/test-ca.conf -new -x509 -utf8 -extensions ca_cert -subj "$(CA_SUBJECT)" \
	    -newkey $(NEWKEY) -nodes -days $(CA_DAYS) -keyout auth/alt-ca/alt-ca.key -out $@)
auth/alt-%.crt: auth/%.req auth/alt-ca/alt-ca.cert
	$(call run,$(OPENSSL) ca -config auth/test-ca.conf -name CA_alt -cert auth/alt-ca/alt-ca.cert \
	    -keyfile auth/alt-ca/alt-ca.key -batch -extensions $*_cert -in $< -days $(DAYS) -out $@ && \
	    cat auth/alt-ca/alt-ca.cert >> $@)
auth/alt-leaf.crt: auth/alt-client.crt
	$(call run,$(OPENSSL) x509 -in auth/alt-client.crt -out $@)
auth/expired-%.crt: auth/%.req $(CA).cert
	$(call run,$(OPENSSL) ca -config auth/test-ca.conf -cert $(CA).cert -keyfile $(CA).key -batch -extensions $*_cert \
	    -in $< -startdate 20200101000000Z -enddate 20200131000000Z -out $@ && cat $(CA).cert >> $@)
auth/future-%.crt: auth/%.req $(CA).cert
	$(call run,$(OPENSSL) ca -config auth/test-ca.conf -cert $(CA).cert -keyfile $(CA).key -batch -extensions $*_cert \
	    -in $< -startdate 20480101000000Z -enddate 20480131000000Z -out $@ && cat $(CA).cert >> $@)
auth/self-signed.crt: auth/client.req
	$(call run,$(OPENSSL) req -config auth/test-ca.conf -new -x509 -utf8 -extensions client_cert -days $(DAYS) \
	    -subj "$(ORGANIZATION)/OU=Client/CN=example.com" -key auth/client.key -out $@)

demo:
	@for end in client server; do \
	    test ! -e auth/$$end.crt || $(OPENSSL) x509 -noout -checkend 60 -in auth/$$end.crt > /dev/null || \
	        { echo "renewing auth/$$end.crt, which has expired"; rm auth/$$end.crt; }; \
	done
	@$(MAKE) -s QUIET=yes certs alt-certs
	@$(PYTHON) tests/demo

test: export MAKE := $(MAKE)
test:
	$(PYTHON) tests

bench: certs
	$(PYTHON) tests/bench.py

clean:
	@$(PYTHON) auth/machines in-use
	rm -rf auth/test-ca auth/alt-ca auth/clients/* auth/servers/* tests/__pycache__
	rm -f auth/*.key auth/*.req auth/*.crt auth/*.new

$(CA).cert auth/client.req auth/server.req: | fit-openssl
fit-openssl:
	@$(OPENSSL) req -help 2>&1 | grep -q -e -addext || \
	    { echo "OpenSSL 1.1.1 or later, or LibreSSL 3.3 or later, is needed; this is $$($(OPENSSL) version)"; exit 1; }

help:
	@echo 'make certs                          make a CA, and certificates for a server and a client'
	@echo 'make demo                           watch a server and a client talk (PORT=0: any free port)'
	@echo 'make alt-certs odd-certs            make a second CA and bad certificates, for the experiments'
	@echo 'make server-cert NAME=db1.internal  issue a certificate for another server (NAMES="db1 10.0.0.7")'
	@echo 'make client-cert NAME=laptop7       issue a certificate for another client'
	@echo 'make list                           show the certificate of each machine'
	@echo 'make check                          report what is broken or about to expire (for cron)'
	@echo 'make renew                          sign every request again, and make a new CRL'
	@echo 'make revoke NAME=laptop7            revoke all its certificates, and make a new CRL'
	@echo 'make crl                            make a new certificate revocation list (CRL)'
	@echo 'make test                           run the tests'
	@echo 'make bench                          measure what connections cost, and compare'
	@echo 'make clean                          delete everything that was generated (FORCE=yes: even a CA in use)'
