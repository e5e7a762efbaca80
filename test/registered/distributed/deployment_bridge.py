"""Deployments under the names that they will have in `pdkit.deployment`, whose place this file takes until it is there.

The annotations are what each provides once its servers are launched: checks ask for it, see `pdkit.checks.base`.
"""

import test_disaggregation_dsv4 as dsv4
from pdkit import fleet_kit, monolithic_kit, router_kit


class PDServers(dsv4.TestDisaggregationDSV4):
    base_host: str
    lb_url: str
    prefill_url: str
    decode_url: str
    bootstrap_port: str
    model: str
    log_dir: str
    process_prefill: dsv4.Server
    process_decode: dsv4.Server
    process_lb: dsv4.Server

    test_gsm8k = None


class MonolithicBeside(monolithic_kit.MonolithicBesideMixin):
    monolithic_url: str


class MonolithicFirst(monolithic_kit.MonolithicFirstMixin):
    monolithic_url: str | None


class RustRouterBeside(router_kit.RustRouterBesideMixin):
    router_url: str


class Fleet(fleet_kit.FleetMixin):
    router_url: str
