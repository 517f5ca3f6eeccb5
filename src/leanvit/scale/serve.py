"""leanvit serve --ray: Ray Serve's replicas run the networks, the server of `leanvit serve` stands before them. No torch.

    client -> Server, Surround, Limits (this process) -> handle -> Replica: predict, infer of leanvit.serve -> network

The HTTP proxy of Ray Serve is left off. Tried with Ray 2.60: of 16 requests at two replicas one of which was killed, the
seven that it had in work were answered 500, which the proxy decides and no deployment behind it can change; and it has
none of this server's limits (headers, connections, slow bodies), no drain and no swap. So a request is taken by the
same code as without Ray, and goes on by a DeploymentHandle, whose exceptions become 503 here. Which requests are taken
is decided here alone: Ray's own limits are wide enough that they never speak.

Bundles go to the replicas as bytes, by a small actor of this process (Shelf), so no disk must be shared. A replaced
bundle is loaded and checked here first; then Ray Serve tells each replica (`reconfigure`), which loads it beside the old
one and swaps, as the plain server does. A new version of the deployment would restart each replica instead: a gap where
there is one of them, and where there is room for no other.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from leanvit.config import ServeConfig
from leanvit.config.scale import LOCAL
from leanvit.errors import ConfigError, EnvironmentProblem, LeanvitError, require
from leanvit.scale.bundles import pack, unpacked
from leanvit.scale.cluster import connected, thread_variables
from leanvit.serve import log
from leanvit.serve.app import PREDICT, create_app, json_response
from leanvit.serve.batcher import Ticket
from leanvit.serve.infer import HEADER_LENGTH, infer
from leanvit.serve.limits import HEADER_BYTES, Limits, protocol, read_token
from leanvit.serve.metrics import Metrics
from leanvit.serve.models import KEPT, Model, Models, fingerprint
from leanvit.serve.predict import predict
from leanvit.serve.priority import switch_often
from leanvit.serve.refusals import Gone, Refusal
from leanvit.serve.run import BACKLOG, GRACE, Server, listen
from leanvit.serve.service import DEADLINE, Service, ticket_for
from leanvit.serve.surround import Surround
