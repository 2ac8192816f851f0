// A Go library in a C++ process: its threads have signal stacks and handlers of their own.
package main

import "C"

import (
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"
)

var spinning int32
var noticed int32

// company_spin keeps four goroutines busy until company_rest is called.
//
//export company_spin
func company_spin() {
	atomic.StoreInt32(&spinning, 1)
	for i := 0; i < 4; i++ {
		go func() {
			sum := 0
			for atomic.LoadInt32(&spinning) == 1 {
				words := make([]int, 1000)
				for at := range words {
					sum += words[at] + at
				}
				if sum%7 == 0 {
					time.Sleep(time.Microsecond)
				}
			}
		}()
	}
}

//export company_rest
func company_rest() { atomic.StoreInt32(&spinning, 0) }

// company_notify has Go's own os/signal listen for SIGUSR2.
//
//export company_notify
func company_notify() {
	channel := make(chan os.Signal, 100)
	signal.Notify(channel, syscall.SIGUSR2)
	go func() {
		for range channel {
			atomic.AddInt32(&noticed, 1)
		}
	}()
}

//export company_noticed
func company_noticed() C.int { return C.int(atomic.LoadInt32(&noticed)) }

func main() {}
