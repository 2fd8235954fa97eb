// SPDX-License-Identifier: Apache-2.0
// Uses memory at full speed in a chosen way, for the tests and benchmarks of memory enforcement:
//
//     hog MODE TOTAL_MB [PROGRESS_FILE [LIMIT_MB]]
//
// What it has done so far is in PROGRESS_FILE, five u64 in a shared mapping, so that whoever stopped or killed it can still
// see how far it came: start_ns, bytes, last_write_ns, crossed_ns (when bytes passed LIMIT_MB), end_ns; CLOCK_MONOTONIC.
// Bytes are added, after the fact, by every process of a fork tree: they sum up as a cgroup's do. Where one system call
// takes it all (populate, mappopulate, read), a second thread follows how far it is with mincore(2). It is stopped with the
// process, though the call may go on until it looks for signals, and where there is one processor it lags: then only the
// resident size, or the leaf's memory.peak, tells the whole.
//
// Files are made in $HOG_DIR (else /dev/shm for tmpfs and tmpfsmap, /tmp for private and shared) and have no name. Exit
// status: 0 and one line when done, 1 if memory was refused with an errno, 2 for wrong usage.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

enum { PAGE = 4096, HUGE = 2 << 20, BLOCK = 64 << 10, CHILDREN = 8, CHURN_SECONDS = 2, HOLD_SECONDS = 60 };

struct progress {
	_Atomic uint64_t start, bytes, last_write, crossed, end;
};

static struct progress *progress;
static uint64_t limit = UINT64_MAX;

static uint64_t now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static _Noreturn void fail(const char *what)
{
	fprintf(stderr, "hog: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void add(uint64_t bytes)
{
	uint64_t sum = atomic_fetch_add(&progress->bytes, bytes) + bytes;
	uint64_t time = now(), never = 0;
	atomic_store(&progress->last_write, time);
	if (sum > limit)
		atomic_compare_exchange_strong(&progress->crossed, &never, time);
}

static char *map(size_t size, int flags, int fd)
{
	char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (memory == MAP_FAILED)
		fail("mmap");
	return memory;
}

static char *map_anonymous(size_t size)
{
	return map(size, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
}

static void touch(char *memory, size_t size)
{
	for (size_t at = 0; at < size; at += PAGE) {
		((volatile char *)memory)[at] = 1;
		add(PAGE);
	}
}

static int nameless_file(const char *otherwise)
{
	const char *directory = getenv("HOG_DIR");
	char path[4096];
	snprintf(path, sizeof path, "%s/hog-XXXXXX", directory ? directory : otherwise);
	int fd = mkostemp(path, O_CLOEXEC);
	if (fd < 0)
		fail(path);
	unlink(path);
	return fd;
}

static void touch_file(size_t size, const char *directory, int flags)
{
	int fd = nameless_file(directory);
	if (ftruncate(fd, (off_t)size))
		fail("ftruncate");
	touch(map(size, flags | MAP_NORESERVE, fd), size);
}

// --- one system call for all of it, and a thread that watches

static char *watched;
static size_t watched_size;
static atomic_bool call_returned;

static bool is_resident(const char *page)
{
	unsigned char state = 0;
	return !mincore((void *)page, PAGE, &state) && state & 1;
}

static void *watch(void *unused)
{
	size_t at = 0;
	(void)unused;
	while (at < watched_size) {
		// Asked before looking: what is not there after the call's return will never be.
		bool last = atomic_load(&call_returned);
		if (is_resident(watched + at)) {
			add(PAGE);
			at += PAGE;
		} else if (last) {
			break;
		}
	}
	return NULL;
}

static pthread_t start_watching(char *memory, size_t size)
{
	pthread_t thread;
	watched = memory;
	watched_size = size;
	errno = pthread_create(&thread, NULL, watch, NULL);
	if (errno)
		fail("pthread_create");
	return thread;
}

static void stop_watching(pthread_t thread)
{
	atomic_store(&call_returned, true);
	pthread_join(thread, NULL);
}

static void do_populate(size_t size)
{
	char *memory = map_anonymous(size);
	pthread_t thread = start_watching(memory, size);
	if (madvise(memory, size, MADV_POPULATE_WRITE))
		fail("MADV_POPULATE_WRITE");
	stop_watching(thread);
}

static void do_mappopulate(size_t size)
{
	// Reserved first: the watcher has to know the address before the call returns.
	char *memory = map_anonymous(size);
	pthread_t thread = start_watching(memory, size);
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_POPULATE;
	if (mmap(memory, size, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED)
		fail("MAP_POPULATE");
	stop_watching(thread);
}

static void do_read(size_t size)
{
	char *memory = map_anonymous(size);
	int fd = open("/dev/zero", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		fail("/dev/zero");
	pthread_t thread = start_watching(memory, size);
	for (size_t at = 0; at < size;) {
		ssize_t got = read(fd, memory + at, size - at);
		if (got < 0 && errno != EINTR)
			fail("read");
		at += got > 0 ? (size_t)got : 0;
	}
	stop_watching(thread);
}

// --- the other modes

static void do_anon(size_t size)
{
	touch(map_anonymous(size), size);
}

static void do_huge(size_t size)
{
	char *memory = map_anonymous(size + HUGE);
	memory += -(uintptr_t)memory % HUGE;
	if (madvise(memory, size, MADV_HUGEPAGE))
		fail("MADV_HUGEPAGE");
	for (size_t at = 0; at < size; at += HUGE) {
		size_t rest = size - at < HUGE ? size - at : HUGE;
		((volatile char *)memory)[at] = 1;
		if (rest == HUGE && is_resident(memory + at + HUGE - PAGE)) {
			add(HUGE);
		} else { // there was none to be had
			touch(memory + at, rest);
		}
	}
}

static void do_tmpfs(size_t size)
{
	static const char block[BLOCK];
	int fd = nameless_file("/dev/shm");
	for (size_t at = 0; at < size;) {
		ssize_t written = write(fd, block, size - at < BLOCK ? size - at : BLOCK);
		if (written < 0 && errno != EINTR)
			fail("write");
		if (written > 0) {
			at += (size_t)written;
			add((uint64_t)written);
		}
	}
}

static void do_tmpfsmap(size_t size)
{
	touch_file(size, "/dev/shm", MAP_SHARED);
}

// The page cache of the file itself is used besides: the kernel reads a page before it copies it.
static void do_private(size_t size)
{
	touch_file(size, "/tmp", MAP_PRIVATE);
}

static void do_shared(size_t size)
{
	touch_file(size, "/tmp", MAP_SHARED);
}

// Eight processes that do `work`, and then wait for each other: together they are to hold all of it. If one is killed, or
// the parent, the others end too.
static void with_children(void (*work)(char *, size_t), char *memory, size_t size)
{
	pid_t pids[CHILDREN];
	int gate[2], ready[2], status, failed = 0;
	if (pipe2(gate, O_CLOEXEC) || pipe2(ready, O_CLOEXEC))
		fail("pipe");
	for (int child = 0; child < CHILDREN; child++) {
		pids[child] = fork();
		if (pids[child] < 0)
			fail("fork");
		if (pids[child] == 0) {
			char byte = 0;
			close(gate[1]);
			work(memory, size);
			if (write(ready[1], &byte, 1) != 1 || read(gate[0], &byte, 1))
				_exit(1);
			_exit(0);
		}
	}
	fcntl(ready[0], F_SETFL, O_NONBLOCK);
	for (int count = 0; count < CHILDREN && !failed;) {
		char byte;
		siginfo_t dead = {0};
		usleep(100);
		while (read(ready[0], &byte, 1) == 1)
			count++;
		failed = waitid(P_ALL, 0, &dead, WEXITED | WNOHANG | WNOWAIT) || dead.si_pid;
	}
	if (failed) // some may still be at work
		for (int child = 0; child < CHILDREN; child++)
			kill(pids[child], SIGKILL);
	close(gate[1]);
	while (wait(&status) > 0)
		failed |= status;
	if (failed) {
		fprintf(stderr, "hog: a child failed\n");
		exit(1);
	}
}

static void take(char *unused, size_t size)
{
	(void)unused;
	do_anon(size);
}

static void look(char *memory, size_t size)
{
	for (size_t at = 0; at < size; at += PAGE)
		(void)((volatile char *)memory)[at];
}

static void do_fork(size_t size)
{
	with_children(take, NULL, size / CHILDREN);
}

static void do_cow(size_t size)
{
	char *memory = map_anonymous(size / CHILDREN);
	touch(memory, size / CHILDREN);
	with_children(look, memory, size / CHILDREN);
}

static void do_churn(size_t size)
{
	uint64_t end = now() + CHURN_SECONDS * UINT64_C(1000000000);
	size = size / CHILDREN / PAGE * PAGE;
	while (now() < end) {
		char *memory = map_anonymous(size);
		touch(memory, size);
		munmap(memory, size);
		atomic_fetch_sub(&progress->bytes, size);
	}
}

static void do_hold(size_t size)
{
	do_anon(size);
	sleep(HOLD_SECONDS);
}

static void ramp(size_t size, double rate)
{
	char *memory = map_anonymous(size);
	uint64_t start = now();
	for (size_t at = 0; at < size; at += BLOCK) {
		uint64_t due = start + (uint64_t)((double)at / (rate * 0x1p20) * 1e9);
		struct timespec until = {.tv_sec = (time_t)(due / 1000000000), .tv_nsec = (long)(due % 1000000000)};
		while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR)
			;
		touch(memory + at, size - at < BLOCK ? size - at : BLOCK);
	}
}

static const struct mode {
	const char *name;
	void (*run)(size_t size);
} modes[] = {
	{"anon", do_anon},       {"huge", do_huge},     {"populate", do_populate}, {"mappopulate", do_mappopulate},
	{"tmpfs", do_tmpfs},     {"private", do_private}, {"shared", do_shared},   {"tmpfsmap", do_tmpfsmap},
	{"fork", do_fork},       {"cow", do_cow},       {"read", do_read},         {"churn", do_churn},
	{"hold", do_hold},
};

static bool run(const char *name, size_t size)
{
	double rate;
	if (sscanf(name, "ramp:%lf", &rate) == 1 && rate > 0) {
		ramp(size, rate);
		return true;
	}
	for (size_t at = 0; at < sizeof modes / sizeof *modes; at++) {
		if (!strcmp(modes[at].name, name)) {
			modes[at].run(size);
			return true;
		}
	}
	return false;
}

static void share_progress(const char *path)
{
	int fd = -1;
	if (path) {
		fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
		if (fd < 0 || ftruncate(fd, PAGE))
			fail(path);
	}
	progress = (void *)map(PAGE, MAP_SHARED | (path ? 0 : MAP_ANONYMOUS), fd);
}

int main(int argc, char **argv)
{
	double total = argc >= 3 ? atof(argv[2]) : 0;
	if (argc < 3 || argc > 5 || total <= 0) {
		fprintf(stderr, "usage: hog MODE TOTAL_MB [PROGRESS_FILE [LIMIT_MB]]\n");
		return 2;
	}
	if (argc == 5)
		limit = (uint64_t)(atof(argv[4]) * 0x1p20);
	share_progress(argc >= 4 ? argv[3] : NULL);
	// As MADV_NOHUGEPAGE, and MAP_POPULATE's mapping has it from the start.
	if (strcmp(argv[1], "huge") && prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0))
		fail("PR_SET_THP_DISABLE");
	atomic_store(&progress->start, now());
	if (!run(argv[1], (size_t)(total * 0x1p20) / PAGE * PAGE)) {
		fprintf(stderr, "hog: no mode %s\n", argv[1]);
		return 2;
	}
	atomic_store(&progress->end, now());
	printf("done %s %g %.1f\n", argv[1], total, (double)(progress->end - progress->start) / 1e6);
	return 0;
}
