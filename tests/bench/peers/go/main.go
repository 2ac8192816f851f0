// Go's side of the benchmarks: context, sync.WaitGroup and os/signal. What it answers to is written in
// ../peer.hpp.
package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"runtime/debug"
	"sort"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

const (
	nodes     = 1000000
	deadlines = 100000
)

var sink int64

// ---- one thread, several threads ----

// Runs body on as many goroutines at once, doubling the operations until a batch takes long enough.
func perOperation(threads int, seconds float64, body func(operations int)) float64 {
	for operations := 256; ; operations *= 2 {
		var ready, done sync.WaitGroup
		start := make(chan struct{})
		for i := 1; i < threads; i++ {
			ready.Add(1)
			done.Add(1)
			go func() {
				ready.Done()
				<-start
				body(operations)
				done.Done()
			}()
		}
		ready.Wait()
		begin := time.Now()
		close(start)
		body(operations)
		done.Wait()
		if took := time.Since(begin); took.Seconds() >= seconds {
			return float64(took.Nanoseconds()) / float64(operations)
		}
	}
}

// The median of single latencies, measured for as long as a batch lasts.
func latency(seconds float64, once func() int64) float64 {
	var all []int64
	for begin := time.Now(); time.Since(begin).Seconds() < seconds || len(all) < 15; {
		all = append(all, once())
	}
	sort.Slice(all, func(i, j int) bool { return all[i] < all[j] })
	return float64(all[len(all)/2])
}

// ---- the operating system ----

// The clock that other processes read, too.
func now() int64 {
	var at syscall.Timespec
	syscall.Syscall(syscall.SYS_CLOCK_GETTIME, 1, uintptr(unsafe.Pointer(&at)), 0)
	return at.Nano()
}

func cpuMilliseconds() float64 {
	var usage syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &usage)
	return float64(usage.Utime.Nano()+usage.Stime.Nano()) / 1e6
}

func residentBytes() int64 {
	text, _ := os.ReadFile("/proc/self/statm")
	pages, _ := strconv.ParseInt(strings.Fields(string(text))[1], 10, 64)
	return pages * int64(os.Getpagesize())
}

func setAffinity(set *[128]byte) {
	tasks, _ := os.ReadDir("/proc/self/task")
	for _, task := range tasks {
		id, _ := strconv.Atoi(task.Name())
		syscall.RawSyscall(syscall.SYS_SCHED_SETAFFINITY, uintptr(id), unsafe.Sizeof(*set),
			uintptr(unsafe.Pointer(set)))
	}
}

// Runs body with every thread on processor 0.
func pinned(body func() float64) float64 {
	var before, first [128]byte
	syscall.RawSyscall(syscall.SYS_SCHED_GETAFFINITY, 0, unsafe.Sizeof(before),
		uintptr(unsafe.Pointer(&before)))
	first[0] = 1
	threads := runtime.GOMAXPROCS(1)
	setAffinity(&first)
	defer func() {
		setAffinity(&before)
		runtime.GOMAXPROCS(threads)
	}()
	return body()
}

// ---- cases ----

func chain(depth int) (context.Context, context.CancelFunc) {
	root, cancel := context.WithCancel(context.Background())
	at := root
	for i := 1; i < depth; i++ {
		at, _ = context.WithCancel(at) //nolint:govet // the root's cancel is theirs
	}
	return at, cancel
}

func check(depth, threads int, seconds float64) float64 {
	at, cancel := chain(depth)
	defer cancel()
	return perOperation(threads, seconds, func(operations int) {
		cancelled := int64(0)
		for i := 0; i < operations; i++ {
			if at.Err() != nil {
				cancelled++
			}
		}
		atomic.AddInt64(&sink, cancelled)
	})
}

func child(threads int, seconds float64) float64 {
	parent, cancel := chain(1)
	defer cancel()
	return perOperation(threads, seconds, func(operations int) {
		for i := 0; i < operations; i++ {
			_, leave := context.WithCancel(parent)
			leave()
		}
	})
}

func deadline(threads int, seconds float64) float64 {
	parent, cancel := chain(1)
	defer cancel()
	return perOperation(threads, seconds, func(operations int) {
		for i := 0; i < operations; i++ {
			_, leave := context.WithTimeout(parent, time.Hour)
			leave()
		}
	})
}

// The collector has its turn before, not in the middle.
func cancelTree(wide bool) float64 {
	root, cancel := chain(1)
	all := make([]context.Context, 0, nodes)
	at := root
	for i := 0; i < nodes; i++ {
		made, _ := context.WithCancel(at) //nolint:govet // the root's cancel is theirs
		all = append(all, made)
		if !wide {
			at = made
		}
	}
	runtime.GC()
	begin := time.Now()
	cancel()
	took := time.Since(begin)
	if all[nodes-1].Err() == nil {
		panic("not cancelled")
	}
	runtime.KeepAlive(all)
	return float64(took.Nanoseconds()) / nodes
}

// What earlier cases have left in the heap is not to be counted.
func inProcessOfItsOwn(name string) float64 {
	text, _ := exec.Command(os.Args[0], name).Output()
	figure, _ := strconv.ParseFloat(strings.TrimSpace(string(text)), 64)
	return figure
}

// A child and what its owner keeps of it: the context and the function that cancels it.
func bytesOfChild() float64 {
	type handle struct {
		child  context.Context
		cancel context.CancelFunc
	}
	parent, cancel := chain(1)
	debug.FreeOSMemory()
	before := residentBytes()
	all := make([]handle, nodes)
	for i := range all {
		all[i].child, all[i].cancel = context.WithCancel(parent)
	}
	debug.FreeOSMemory()
	after := residentBytes()
	runtime.KeepAlive(all)
	cancel()
	all = nil
	debug.FreeOSMemory()
	return float64(after-before) / nodes
}

func guard(threads int, seconds float64) float64 {
	var group sync.WaitGroup
	group.Add(1)
	return perOperation(threads, seconds, func(operations int) {
		for i := 0; i < operations; i++ {
			group.Add(1)
			group.Done()
		}
	})
}

func lastOut(seconds float64) float64 {
	return latency(seconds, func() int64 {
		var group sync.WaitGroup
		group.Add(1)
		woken := make(chan int64, 1)
		go func() {
			group.Wait()
			woken <- now()
		}()
		// On one processor: it has gone as far as it can when this goes on.
		for i := 0; i < 4; i++ {
			runtime.Gosched()
		}
		begin := now()
		group.Done()
		return <-woken - begin
	})
}

// The worker is a goroutine that waits for the context's end.
func signalled(seconds float64) float64 {
	return latency(seconds, func() int64 {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		woken := make(chan int64, 1)
		ready := make(chan struct{})
		go func() {
			close(ready)
			<-ctx.Done()
			woken <- now()
		}()
		<-ready
		time.Sleep(200 * time.Microsecond)
		begin := now()
		syscall.Kill(syscall.Getpid(), syscall.SIGTERM)
		took := <-woken - begin
		stop()
		return took
	})
}

var lateness []int64

func fireDeadlines() float64 {
	lateness = make([]int64, deadlines)
	parent, cancel := chain(1)
	defer cancel()
	runtime.GC()
	var left sync.WaitGroup
	left.Add(deadlines)
	before := cpuMilliseconds()
	first := time.Now().Add(300 * time.Millisecond)
	for i := 0; i < deadlines; i++ {
		i, due := i, first.Add(time.Duration(i)*time.Second/deadlines)
		ctx, _ := context.WithDeadline(parent, due) //nolint:govet // it fires
		whenDone(ctx, func() {
			lateness[i] = int64(time.Since(due))
			left.Done()
		})
	}
	left.Wait()
	return cpuMilliseconds() - before
}

func deadlinesLate() float64 {
	if lateness == nil {
		fireDeadlines()
	}
	sort.Slice(lateness, func(i, j int) bool { return lateness[i] < lateness[j] })
	return float64(lateness[len(lateness)*99/100]) / 1e6
}

func run(name string, seconds float64) (float64, bool) {
	threads := 1
	if strings.HasSuffix(name, "/2") {
		threads = 2
	}
	switch strings.Split(name, "/")[0] {
	case "check":
		return check(1, threads, seconds), true
	case "check8":
		return check(8, threads, seconds), true
	case "child":
		return child(threads, seconds), true
	case "callback":
		return callback(threads, seconds)
	case "cancel_wide":
		return cancelTree(true), true
	case "cancel_deep":
		return cancelTree(false), true
	case "bytes_child":
		return inProcessOfItsOwn(name), true
	case "guard":
		return guard(threads, seconds), true
	case "last_out":
		return pinned(func() float64 { return lastOut(seconds) }), true
	case "signal":
		return pinned(func() float64 { return signalled(seconds) }), true
	case "signal_two":
		return signalled(seconds), true
	case "deadline":
		return deadline(threads, seconds), true
	case "deadlines_fire":
		return fireDeadlines(), true
	case "deadlines_late":
		return deadlinesLate(), true
	}
	return 0, false
}

// ---- whole processes ----

// Waits for SIGTERM with so many goroutines, then sees them out.
func serve(waiters int) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	var group sync.WaitGroup
	group.Add(waiters)
	for i := 0; i < waiters; i++ {
		go func() {
			<-ctx.Done()
			group.Done()
		}()
	}
	fmt.Println("ready")
	<-ctx.Done()
	group.Wait()
}

// For each SIGTERM: when a goroutine that waits for it runs.
func await() {
	for {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		woken := make(chan int64)
		go func() {
			<-ctx.Done()
			woken <- now()
		}()
		fmt.Println("ready")
		fmt.Println(<-woken)
		stop()
	}
}

func main() {
	if len(os.Args) == 3 && os.Args[1] == "serve" {
		waiters, _ := strconv.Atoi(os.Args[2])
		serve(waiters)
		return
	}
	if len(os.Args) == 2 && os.Args[1] == "await" {
		await()
	}
	if len(os.Args) == 2 && os.Args[1] == "bytes_child" {
		fmt.Println(bytesOfChild())
		return
	}
	// The benchmark's own signals are between NotifyContexts, too.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGTERM)
	fmt.Println("peer go", strings.TrimPrefix(runtime.Version(), "go"))
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		if len(words) != 3 || words[0] != "run" {
			continue
		}
		seconds, _ := strconv.ParseFloat(words[2], 64)
		if figure, ok := run(words[1], seconds); ok {
			fmt.Printf("%s %.3f\n", words[1], figure)
		} else {
			fmt.Println(words[1], "unsupported")
		}
	}
}
