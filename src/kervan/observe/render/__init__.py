"""Prometheus and Grafana for fleets: queries, rules, dashboards, scrape configuration, all made from data in code."""
