//go:build !go1.21

package main

import "context"

// There is no context.AfterFunc yet.
func callback(int, float64) (float64, bool) { return 0, false }

func whenDone(ctx context.Context, do func()) {
	go func() {
		<-ctx.Done()
		do()
	}()
}
