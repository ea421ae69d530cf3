"""What users read when Serve's proxies do not start."""

from kervan.serve.app import proxy_failure

HAPROXY = """[36mray::HAProxyManager.ready()[39m (pid=22211, ip=192.0.2.2)
RuntimeError: HAProxy crashed during startup: [NOTICE]   (22494) : haproxy version is 2.8.25-5cf5d0683
[ALERT]    (22494) : Binding [/tmp/h/haproxy.cfg:45] for frontend prometheus: cannot bind socket (Address already in use) \
for [0.0.0.0:9101]
[ALERT]    (22494) : Binding [/tmp/h/haproxy.cfg:95] for proxy stats: cannot bind socket (Address already in use) for \
[0.0.0.0:8404]
[ALERT]    (22494) : [haproxy.main()] Some protocols failed to start their listeners! Exiting.
"""


def test_a_port_that_another_proxy_has() -> None:
    said = proxy_failure(HAPROXY)
    assert "0.0.0.0:9101 and 0.0.0.0:8404 of a node is taken" in said
    assert "RAY_SERVE_HAPROXY_METRICS_PORT" in said
    assert "--ingress direct" in said
    assert "\n" not in said


def test_other_failures_are_told_in_one_line() -> None:
    assert "did not start: Ray says nothing of it" in proxy_failure("")
    said = proxy_failure("Traceback\n  File x\nRuntimeError: " + "y" * 900)
    assert "\n" not in said
    assert "RuntimeError: yyy" in said
    assert len(said) < 500
