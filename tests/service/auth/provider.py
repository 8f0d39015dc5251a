"""An identity provider."""

import json
import time
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from loraplex_service.auth.config import JwtConfig


def public(name: str, key: ec.EllipticCurvePrivateKey, use: str = "sig") -> dict[str, Any]:
    """As it is published."""
    return {**json.loads(ECAlgorithm.to_jwk(key.public_key())), "kid": name, "use": use, "alg": "ES256"}


class Provider:
    """Signs tokens, and publishes its keys in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.keys: dict[str, ec.EllipticCurvePrivateKey] = {}
        self.rotate("k1")
        self.config = JwtConfig(
            issuer="https://id.example", audience="loraplex", jwks=str(file), algorithms=("ES256",), leeway_seconds=0
        )

    def rotate(self, key_id: str) -> None:
        self.keys = {key_id: ec.generate_private_key(ec.SECP256R1())}
        self.file.write_text(json.dumps({"keys": [public(name, key) for name, key in self.keys.items()]}))

    def token(self, key: Any = None, algorithm: str = "ES256", **claims: Any) -> str:
        [(key_id, own)] = self.keys.items()
        usual = {
            "iss": "https://id.example",
            "aud": "loraplex",
            "exp": time.time() + 60,
            "tenant": "acme",
            "sub": "joe",
        }
        kept = {name: value for name, value in {**usual, **claims}.items() if value is not None}
        return jwt.encode(kept, own if key is None else key, algorithm, headers={"kid": key_id})
