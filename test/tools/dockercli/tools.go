//go:build tools

// Package dockercli pins the docker CLI so that the Makefile can build it. It is never built itself.
package dockercli

import _ "github.com/docker/cli/cmd/docker"
