//go:build go1.21

package main

import "context"

func callback(threads int, seconds float64) (float64, bool) {
	parent, cancel := chain(1)
	defer cancel()
	return perOperation(threads, seconds, func(operations int) {
		for i := 0; i < operations; i++ {
			stop := context.AfterFunc(parent, func() {})
			stop()
		}
	}), true
}

func whenDone(ctx context.Context, do func()) { context.AfterFunc(ctx, do) }
