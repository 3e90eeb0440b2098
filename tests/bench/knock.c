// Kills whoever accepts on a port of loopback and connects until somebody else accepts there: prints the nanoseconds.
// A process of its own, and a small one: a client that shared an interpreter with one of the supervised would slow that
// one down alone. Usage: knock PORT SECONDS
#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long long now(void)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec * 1000000000LL + at.tv_nsec;
}

// The process id of whoever accepts now, 0 if nobody does.
static int answer(int port)
{
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct timeval second = { .tv_sec = 1 };
	char said[16] = "";
	int got = 0, channel = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	at.sin_port = htons(port);
	setsockopt(channel, SOL_SOCKET, SO_RCVTIMEO, &second, sizeof second);
	if (!connect(channel, (struct sockaddr *)&at, sizeof at))
		got = recv(channel, said, sizeof said - 1, 0);
	close(channel);
	return got > 0 ? atoi(said) : 0;
}

int main(int argc, char **argv)
{
	const struct timespec pause = { .tv_nsec = 100000 };
	long long begin, end;
	int port, old, new;

	if (argc != 3)
		return 2;
	port = atoi(argv[1]);
	end = now() + atoi(argv[2]) * 1000000000LL;
	while (!(old = answer(port))) {
		if (now() > end)
			return 1;
		nanosleep(&pause, NULL);
	}
	begin = now();
	kill(old, SIGKILL);
	while ((new = answer(port)) == 0 || new == old) {
		if (now() > end)
			return 1;
		nanosleep(&pause, NULL);
	}
	printf("%lld\n", now() - begin);
	return 0;
}
