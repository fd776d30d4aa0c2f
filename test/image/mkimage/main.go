// Command mkimage makes one of the test images in the cache and, with -push, brings it into a registry.
//
//	mkimage demo
//	mkimage -format estargz -push http://127.0.0.1:5000 busybox
//	mkimage -size 1073741824 random
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "mkimage: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	cache := flag.String("cache", rig.ImageDir(), "folder of the finished images")
	formatName := flag.String("format", "gzip", "layers of all but random: gzip, estargz, zstdchunked, zstd, tar")
	size := flag.Int64("size", 256<<20, "bytes of each layer of random, a multiple of 512")
	layers := flag.Int("layers", 1, "layers of random")
	push := flag.String("push", "", "URL of a registry to push to, as NAME:FORMAT")
	flag.Usage = func() {
		fmt.Fprintf(os.Stderr, "usage: mkimage [flags] busybox|demo|random|python|node|jvm|postgres|nginx\n")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() != 1 {
		flag.Usage()
		return fmt.Errorf("one image at a time, not %d", flag.NArg())
	}
	format, err := image.ParseFormat(*formatName)
	if err != nil {
		return err
	}
	begin := time.Now()
	var i *image.Image
	switch name := flag.Arg(0); name {
	case "busybox":
		i, err = image.Busybox(ctx, *cache, format)
	case "demo":
		i, err = image.Demo(ctx, *cache, format)
	case "random":
		i, err = image.Random(ctx, *cache, *size, *layers)
	default:
		var app image.App
		if app, err = image.FindApp(name); err == nil {
			i, err = app.Make(ctx, *cache, format)
		}
	}
	if err != nil {
		return err
	}
	fmt.Printf("%s %s\n%d bytes, made or found in %s\n", i.Manifest.Digest, i.Dir, i.Size(), time.Since(begin).Round(time.Millisecond))
	for _, layer := range i.Layers {
		fmt.Printf("  %s %11d %s\n", layer.Digest, layer.Size, layer.MediaType)
	}
	if *push == "" {
		return nil
	}
	return i.Push(ctx, image.Target{URL: *push}, flag.Arg(0), format.String())
}
