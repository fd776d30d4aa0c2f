package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
)

// httpBuffer is what the candidate http reads and writes at a time: the cheapest for the kernel of 32 KiB to 1 MiB. From 512 KiB
// on a write costs it several times as much (see writeSize in fetcher/store).
const httpBuffer = 128 << 10

// plainHTTP is the candidate http: arguments are the blob's URL, its digest and size, and the file to write.
func plainHTTP(args []string) error {
	if len(args) != 4 {
		return errors.New("URL DIGEST SIZE FILE")
	}
	url, want, size, path := args[0], args[1], args[2], args[3]
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	var last int64
	if _, err := fmt.Sscan(size, &last); err != nil {
		return err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=0-%d", last-1))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusPartialContent {
		return fmt.Errorf("GET %s: %s", url, resp.Status)
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	h := sha256.New()
	// Only the reader's and the writer's plain methods: no splice that would pass the hash by.
	if _, err := io.CopyBuffer(io.MultiWriter(f, h), struct{ io.Reader }{resp.Body}, make([]byte, httpBuffer)); err != nil {
		return err
	}
	if got := "sha256:" + hex.EncodeToString(h.Sum(nil)); got != want {
		return fmt.Errorf("got %s instead of %s", got, want)
	}
	return f.Close()
}
