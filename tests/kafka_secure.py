"""A broker that asks who comes: an authority, certificates good and bad, users with passwords, and rights that can be given and taken.

Its listeners: OPEN lets anybody do anything (only so can a test prepare what others may not), SECURE speaks TLS and wants SASL, PLAIN wants
SASL without TLS, MUTUAL wants a certificate, and EXPIRED, STRANGE and ELSEWHERE have certificates that no client should take.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import trustme
from cryptography.hazmat.primitives import serialization
from kafka.admin import ACL, ACLOperation, ACLPermissionType, ACLResourcePatternType, KafkaAdminClient, ResourcePattern, ResourceType

from tests.kafka_cluster import KafkaCluster, free_ports

PASSWORD = "Xq7-distinctive-Zebra"
WRONG = "Wr0ng-Kangaroo-9731"
SCRAM_USER = "scrambled"
LISTENERS = ("OPEN", "SECURE", "SASL", "MUTUAL", "EXPIRED", "STRANGE", "ELSEWHERE")


class Right(NamedTuple):
    """What a user may do with a resource; a name that ends in * stands for all that begin so."""

    kind: str
    name: str
    operation: str

    def acl(self, user: str) -> ACL:
        prefixed = self.name.endswith("*") and self.name != "*"
        pattern = ACLResourcePatternType.PREFIXED if prefixed else ACLResourcePatternType.LITERAL
        resource = ResourcePattern(ResourceType[self.kind], self.name.removesuffix("*") or "*", pattern)
        return ACL(f"User:{user}", "*", ACLOperation[self.operation], ACLPermissionType.ALLOW, resource)


class SecureCluster(KafkaCluster):
    """One node with the listeners above. ``users`` get `PASSWORD`, by PLAIN; `SCRAM_USER` has it by SCRAM-SHA-512."""

    def __init__(self, folder: Path, users: Iterable[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.ports = dict(zip(LISTENERS, free_ports(len(LISTENERS)), strict=True))
        (controller,) = free_ports(1)
        authority, other = trustme.CA(), trustme.CA()
        now = dt.datetime.now(dt.UTC)
        stores = {
            "SECURE": authority.issue_cert("127.0.0.1", "localhost"),
            "MUTUAL": authority.issue_cert("127.0.0.1"),
            "EXPIRED": authority.issue_cert("127.0.0.1", not_before=now - dt.timedelta(9), not_after=now - dt.timedelta(2)),
            "STRANGE": other.issue_cert("127.0.0.1"),
            "ELSEWHERE": authority.issue_cert("kafka.example.org"),
        }
        self.ca = folder / "ca.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        self.client_cert, self.client_key = folder / "client.pem", folder / "client.key"
        client = authority.issue_cert("client.example.org", common_name="client")
        client.cert_chain_pems[0].write_to_path(str(self.client_cert))
        client.private_key_pem.write_to_path(str(self.client_key))
        protocols = {"OPEN": "PLAINTEXT", "SECURE": "SASL_SSL", "SASL": "SASL_PLAINTEXT"}
        settings = {
            "listeners": ",".join(f"{name}://127.0.0.1:{port}" for name, port in self.ports.items())
            + f",CONTROLLER://127.0.0.1:{controller}",
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,"
            + ",".join(f"{name}:{protocols.get(name, 'SSL')}" for name in LISTENERS),
            "inter.broker.listener.name": "OPEN",
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS;User:root",
            "allow.everyone.if.no.acl.found": "false",
            "group.min.session.timeout.ms": "200",
        }
        known = " ".join(f'user_{user}="{PASSWORD}"' for user in users)
        module = "org.apache.kafka.common.security"
        for name in ("secure", "sasl"):
            settings[f"listener.name.{name}.sasl.enabled.mechanisms"] = "PLAIN,SCRAM-SHA-512"
            settings[f"listener.name.{name}.plain.sasl.jaas.config"] = f"{module}.plain.PlainLoginModule required {known};"
            settings[f"listener.name.{name}.scram-sha-512.sasl.jaas.config"] = f"{module}.scram.ScramLoginModule required;"
        for name, certificate in stores.items():
            path = folder / f"{name.lower()}.pem"
            path.write_bytes(_pkcs8(certificate.private_key_pem.bytes()) + b"".join(pem.bytes() for pem in certificate.cert_chain_pems))
            settings[f"listener.name.{name.lower()}.ssl.keystore.type"] = "PEM"
            settings[f"listener.name.{name.lower()}.ssl.keystore.location"] = str(path)
        settings["listener.name.mutual.ssl.client.auth"] = "required"
        settings["listener.name.mutual.ssl.truststore.type"] = "PEM"
        settings["listener.name.mutual.ssl.truststore.location"] = str(self.ca)
        scram = f"SCRAM-SHA-512=[name={SCRAM_USER},password={PASSWORD}]"
        super().__init__(folder, ports=[self.ports["OPEN"]], settings=settings, scram=scram)

    def at(self, listener: str) -> str:
        """The setting ``broker`` for one of the listeners."""
        return f"kafka:127.0.0.1:{self.ports[listener]}"

    def sasl(self, user: str, password_file: Path | str = "", mechanism: str = "PLAIN", **more: Any) -> dict[str, Any]:  # noqa: ANN401 - as the settings
        """Settings ``kafka`` of a user at the listener SECURE."""
        return {
            "protocol": "SASL_SSL",
            "ca_file": str(self.ca),
            "mechanism": mechanism,
            "username": user,
            "password_file": str(password_file),
            "request_timeout_ms": 20_000,
            "transaction_timeout_ms": 20_000,
            **more,
        }

    def admin(self) -> KafkaAdminClient:
        """Somebody who may do everything."""
        return KafkaAdminClient(bootstrap_servers=[f"127.0.0.1:{self.ports['OPEN']}"])


def _pkcs8(pem: bytes) -> bytes:
    """A key as Kafka takes it."""
    key = serialization.load_pem_private_key(pem, None)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
