// What both Rust programs share: the protocol of ../peer.hpp, batches, latencies, the operating system.
use std::io::{BufRead, Write};
use std::sync::Barrier;
use std::time::{Duration, Instant};

/// Runs `body` on so many threads at once, doubling the operations until a batch takes long enough.
/// Nanoseconds per operation of one thread.
#[allow(dead_code)]
pub fn per_operation(threads: usize, seconds: f64, body: impl Fn(usize) + Sync) -> f64 {
    let mut operations = 256;
    loop {
        let start = Barrier::new(threads);
        let took = std::thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(|| {
                    start.wait();
                    body(operations);
                });
            }
            start.wait();
            let begin = Instant::now();
            body(operations);
            begin
        })
        .elapsed();
        if took.as_secs_f64() >= seconds {
            return took.as_nanos() as f64 / operations as f64;
        }
        operations *= 2;
    }
}

/// The median of single latencies, measured for as long as a batch lasts.
pub fn latency(seconds: f64, mut once: impl FnMut() -> i64) -> f64 {
    let begin = Instant::now();
    let mut all = Vec::new();
    while begin.elapsed().as_secs_f64() < seconds || all.len() < 15 {
        all.push(once());
    }
    all.sort_unstable();
    all[all.len() / 2] as f64
}

/// The clock that other processes read, too.
pub fn now() -> i64 {
    let mut at = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut at) };
    at.tv_sec * 1_000_000_000 + at.tv_nsec
}

/// Long enough for the other threads to fall asleep.
pub fn settle() {
    std::thread::sleep(Duration::from_micros(200));
}

pub fn raise_sigterm() {
    unsafe { libc::kill(libc::getpid(), libc::SIGTERM) };
}

/// Runs `body` on processor 0, with the threads that it makes.
pub fn pinned(body: impl FnOnce() -> f64) -> f64 {
    unsafe {
        let mut before: libc::cpu_set_t = std::mem::zeroed();
        libc::sched_getaffinity(0, std::mem::size_of_val(&before), &mut before);
        let mut first: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(0, &mut first);
        libc::sched_setaffinity(0, std::mem::size_of_val(&first), &first);
        let figure = body();
        libc::sched_setaffinity(0, std::mem::size_of_val(&before), &before);
        figure
    }
}

/// Answers line by line. `run` says None to what it does not know.
pub fn answer(name: &str, version: &str, run: impl Fn(&str, usize, f64) -> Option<f64>) {
    println!("peer {name} {version}");
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap_or_default();
        let words: Vec<&str> = line.split_whitespace().collect();
        if let ["run", case, seconds] = words[..] {
            let (kind, threads) = case.split_once('/').unwrap_or((case, "1"));
            let threads = threads.parse().unwrap_or(1);
            match run(kind, threads, seconds.parse().unwrap_or(0.015)) {
                Some(figure) => println!("{case} {figure:.3}"),
                None => println!("{case} unsupported"),
            }
        }
        let _ = std::io::stdout().flush();
    }
}
