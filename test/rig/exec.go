package rig

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// waitDelay is how long a killed command's pipes may stay open, held by a grandchild, before they are closed.
const waitDelay = 5 * time.Second

// command prepares a program of Bin inside a node's namespace; nil is this process's.
func command(ctx context.Context, node *Node, env []string, program string, args ...string) (*exec.Cmd, error) {
	path := program
	if filepath.Base(program) == program {
		found, err := Bin(program)
		if err != nil {
			return nil, err
		}
		path = found
	}
	if node != nil {
		args = append([]string{"--net=" + node.path(), "--", path}, args...)
		path = "nsenter"
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.WaitDelay = waitDelay
	return cmd, nil
}

// output runs a command and returns its standard output; the error holds what it wrote to standard error.
func output(ctx context.Context, node *Node, env []string, program string, args ...string) (string, error) {
	cmd, err := command(ctx, node, env, program, args...)
	if err != nil {
		return "", err
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s %s: %w: %s", filepath.Base(program), strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.String(), nil
}

// Run runs a program to its end, in the node's namespace, and returns its standard output; the error holds what it wrote to
// standard error. The program is found by Bin. A nil node is this process's own namespace.
func (n *Node) Run(ctx context.Context, env []string, program string, args ...string) (string, error) {
	return output(ctx, n, env, program, args...)
}

// Command is like exec.CommandContext inside the node's namespace, with env added to this process's environment.
func (n *Node) Command(ctx context.Context, env []string, program string, args ...string) (*exec.Cmd, error) {
	return command(ctx, n, env, program, args...)
}
