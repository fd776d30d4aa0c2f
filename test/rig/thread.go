package rig

import (
	"os/exec"
	"runtime"
	"sync"
)

// The kernel delivers Pdeathsig when the *thread* that started the child ends (prctl(2)), and Go ends a thread whose goroutine
// was locked to it, as [Node.Do] does. So children are started by one goroutine that owns a thread for good.
var starter struct {
	once sync.Once
	jobs chan func()
}

// startOnLastingThread is cmd.Start on a thread that lasts as long as this process.
func startOnLastingThread(cmd *exec.Cmd) error {
	starter.once.Do(func() {
		starter.jobs = make(chan func())
		go func() {
			runtime.LockOSThread()
			for job := range starter.jobs {
				job()
			}
		}()
	})
	result := make(chan error, 1)
	starter.jobs <- func() { result <- cmd.Start() }
	return <-result
}
