#!/bin/bash
# What a container does: a sweep with these arguments, or the program that they name. Ray's launcher
# starts its containers with `bash`, and Kubernetes with a shell.
case "${1:-}" in
    "" | -* | *.yaml | *.yml) ;;
    *)
        if command -v -- "$1" >/dev/null; then
            exec "$@"
        fi
        ;;
esac
exec python -m ftd_ray.sweep "$@"
