// Command reachable exits 0 when a URL answers with status 200 within ten seconds, through the proxies of the
// environment, and 1 otherwise. The Makefile asks it whether a check that needs the network can run at all.
package main

import (
	"fmt"
	"net/http"
	"os"
	"time"
)

// patience bounds the question: a host behind a silent firewall must not hold up a build.
const patience = 10 * time.Second

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: reachable URL")
		os.Exit(2)
	}
	client := &http.Client{Timeout: patience}
	resp, err := client.Get(os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		fmt.Fprintf(os.Stderr, "%s answered %s\n", os.Args[1], resp.Status)
		os.Exit(1)
	}
}
