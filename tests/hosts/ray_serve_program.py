"""Runs the application on a Ray of its own: a program of the environment that has Ray.

    ray_serve_program.py PORT '{"models": "demo", …}'

Says "ready" when it answers, and ends when its input does.
"""

from __future__ import annotations

import json
import sys

import ray
from ray import serve

from latentrt.hosts.ray.serving import application

if __name__ == "__main__":
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(application(json.loads(sys.argv[2])))
    print("ready", flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()
