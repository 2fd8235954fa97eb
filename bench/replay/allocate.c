// SPDX-License-Identifier: Apache-2.0
// The workload of the replay: has as much memory as a time line says, and notes how long each piece of it took to get.
//
//     allocate STEPS GATE OUT
//
// STEPS has lines "ms MB": from then on that much, in whole MB. The first line is had before it starts, untimed: that is the
// agent itself. Then it says so in OUT, and starts when nobody holds GATE (flock) any more. A step that comes late delays
// all after it: the line stands for work, and work that waited for memory is still to be done. Waits that are due anyway
// absorb what allocating takes.
//
// OUT is u32s: 0 (ready), then the µs of each MB, then UINT32_MAX and the ms from start to end. Each is written at once,
// so that they are there if it is killed.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, MOST_MB = 8192, MOST_STEPS = 4096 };
#define MB ((size_t)1 << 20)
#define SECOND UINT64_C(1000000000)

static struct step {
	double ms;
	unsigned mb;
} steps[MOST_STEPS];
static char *memory;
static unsigned level;
static int out;

static uint64_t now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * SECOND + (uint64_t)time.tv_nsec;
}

static _Noreturn void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void note(uint32_t value)
{
	if (write(out, &value, sizeof value) != sizeof value)
		fail("write");
}

static void grow(void)
{
	char *chunk = memory + level++ * MB;
	for (size_t at = 0; at < MB; at += PAGE)
		((volatile char *)chunk)[at] = 1;
}

static void shrink(unsigned to)
{
	if (madvise(memory + to * MB, (level - to) * MB, MADV_DONTNEED))
		fail("MADV_DONTNEED");
	level = to;
}

static void sleep_until(uint64_t due)
{
	struct timespec until = {.tv_sec = (time_t)(due / SECOND), .tv_nsec = (long)(due % SECOND)};
	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR)
		;
}

static unsigned read_steps(const char *path)
{
	unsigned count = 0;
	FILE *file = fopen(path, "re");
	if (!file)
		fail(path);
	while (count < MOST_STEPS && fscanf(file, "%lf %u", &steps[count].ms, &steps[count].mb) == 2)
		if (steps[count++].mb > MOST_MB)
			exit(2);
	fclose(file);
	return count;
}

int main(int argc, char **argv)
{
	unsigned count = argc == 4 ? read_steps(argv[1]) : 0;
	if (!count) {
		fprintf(stderr, "usage: allocate STEPS GATE OUT\n");
		return 2;
	}
	int gate = open(argv[2], O_RDONLY | O_CLOEXEC);
	out = open(argv[3], O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
	if (gate < 0 || out < 0)
		fail("open");
	// Every page is charged by itself: what is measured is the charge, not the luck with huge pages.
	prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
	memory = mmap(NULL, MOST_MB * MB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (memory == MAP_FAILED)
		fail("mmap");
	while (level < steps[0].mb)
		grow();
	note(0);
	while (flock(gate, LOCK_SH))
		if (errno != EINTR)
			fail("flock");
	close(gate);

	uint64_t start = now(), due = start;
	for (unsigned at = 1; at < count; at++) {
		due += (uint64_t)((steps[at].ms - steps[at - 1].ms) * 1e6);
		if (now() > due)
			due = now();
		else
			sleep_until(due);
		if (steps[at].mb < level)
			shrink(steps[at].mb);
		while (level < steps[at].mb) {
			uint64_t before = now();
			grow();
			note((uint32_t)((now() - before) / 1000));
		}
	}
	note(UINT32_MAX);
	note((uint32_t)((now() - start) / 1000000));
	return 0;
}
